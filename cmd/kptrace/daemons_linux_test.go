package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
)

// TestConntrackd runs beside Debian's conntrackd, which follows connection tracking and
// keeps a table of its own. Neither takes anything from the other.
func TestConntrackd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1, 2)})
	w.serve(1, 2)
	conf := filepath.Join(w.dir, "conntrackd.conf")
	writeFile(t, conf, fmt.Sprintf(`General {
	HashSize 8192
	HashLimit 65535
	LockFile %[1]s/conntrackd.lock
	UNIX {
		Path %[1]s/conntrackd.ctl
	}
	NetlinkBufferSize 2097152
	NetlinkBufferSizeMaxGrowth 8388608
}
Stats {
	LogFile off
}
`, w.dir))
	d := w.start("conntrackd", "-C", conf)
	// counts are "connections created" and "current active connections" as it tells them.
	counts := func() (created, active int) {
		if _, err := os.Stat(filepath.Join(w.dir, "conntrackd.ctl")); err != nil {
			return -1, -1
		}
		out := w.run("", "conntrackd", "-C", conf, "-s")
		number := func(what string) int {
			m := regexp.MustCompile(what + `:\s+(\d+)`).FindStringSubmatch(out)
			if m == nil {
				t.Fatalf("no %q in what conntrackd says:\n%s", what, out)
			}
			n, _ := strconv.Atoi(m[1])
			return n
		}
		return number("connections created"), number("active connections")
	}
	eventually(t, patient, "conntrackd at work", func() bool {
		select {
		case <-d.Done():
			t.Fatalf("conntrackd ended: %s%s", d.out, d.err)
		default:
		}
		n, _ := counts()
		return n >= 0
	})
	w.synced(w.proxy())
	before, _ := counts()
	const n = 100
	ports := map[int]bool{}
	for range n {
		port, ok := w.connect("10.96.0.10:80", patient)
		if !ok {
			t.Fatal("no answer")
		}
		ports[port] = true
	}
	closed := 0
	eventually(t, patient, "all connections and their ends", func() bool {
		closed = 0
		for port, f := range w.flows() {
			if ports[port] && f.Outcome == "closed" && !f.Incomplete && len(f.Evidence) == 2 {
				closed++
			}
		}
		return closed == len(ports)
	})
	created, active := 0, 0
	eventually(t, patient, "all of them at conntrackd", func() bool {
		created, active = counts()
		return created-before >= n && active >= len(ports)
	})
	t.Logf("kptrace shows %d of %d connections whole, conntrackd counts %d, %d of them held", closed, len(ports), created-before, active)
}

// TestUlogd runs beside Debian's ulogd, which logs packets that a rule sends to a group
// of its own; and beside one that holds kptrace's group.
func TestUlogd(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		group int
	}{{"another group", 32}, {"our group", 100}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1, 2)})
			w.serve(1, 2)
			w.run("", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
			w.run("*mangle\n-A OUTPUT -p tcp --syn -d 10.96.0.10 -j NFLOG --nflog-group "+strconv.Itoa(tt.group)+" --nflog-prefix seen\nCOMMIT\n", "iptables-nft-restore", "--noflush")
			conf, log := filepath.Join(w.dir, "ulogd.conf"), filepath.Join(w.dir, "packets")
			var plugins strings.Builder
			for _, name := range []string{"inppkt_NFLOG", "raw2packet_BASE", "filter_IFINDEX", "filter_IP2STR", "filter_PRINTPKT", "output_LOGEMU"} {
				fmt.Fprintf(&plugins, "plugin=%q\n", filepath.Join(ulogdPlugins(t), "ulogd_"+name+".so"))
			}
			writeFile(t, conf, fmt.Sprintf(`[global]
logfile="stdout"
loglevel=3
%s
stack=log:NFLOG,base:BASE,if:IFINDEX,ip:IP2STR,print:PRINTPKT,emu:LOGEMU
[log]
group=%d
[emu]
file=%q
sync=1
`, plugins.String(), tt.group, log))
			u := w.start("ulogd", "-c", conf)
			logged := func() int {
				b, err := os.ReadFile(log)
				if err != nil {
					return 0
				}
				return strings.Count(string(b), "seen")
			}
			eventually(t, patient, "ulogd at work", func() bool {
				select {
				case <-u.Done():
					t.Fatalf("ulogd ended: %s%s", u.out, u.err)
				default:
				}
				_, err := os.Stat(log)
				return err == nil
			})
			if tt.group == 100 {
				eventually(t, patient, "ulogd to hold the group", func() bool {
					return strings.Contains(w.run("", "cat", "/proc/net/netfilter/nfnetlink_log"), " 100 ")
				})
			}
			w.synced(w.proxy())
			const n = 50
			for range n {
				if _, ok := w.connect("10.96.0.10:80", patient); !ok {
					t.Fatal("no answer")
				}
			}
			eventually(t, patient, "all packets at ulogd", func() bool { return logged() >= n })
			if tt.group == 100 {
				code, out, _ := w.kptrace("check")
				if code != 0 || !strings.Contains(out, "nflog-held") || !strings.Contains(out, "ulogd") {
					t.Errorf("check: exit %d: %s", code, out)
				}
				eventually(t, patient, "status to name it", func() bool { return strings.Contains(w.must("status"), "ulogd") })
				u.stop(syscall.SIGTERM)
				eventually(t, 40*time.Second, "connections to be shown", func() bool {
					w.visit("10.96.0.10")
					return len(w.flows()) > 0
				})
				return
			}
			eventually(t, patient, "all connections", func() bool {
				closed := 0
				for _, f := range w.flows() {
					if f.Outcome == "closed" && !f.Incomplete && len(f.Evidence) == 2 {
						closed++
					}
				}
				return closed == n
			})
			if got := logged(); got != n {
				t.Errorf("ulogd logged %d packets, want %d", got, n)
			}
		})
	}
}

// ulogdPlugins is the folder of ulogd's plugins: beside the program where that was
// unpacked, else where Debian has it.
func ulogdPlugins(t *testing.T) string {
	t.Helper()
	program, err := exec.LookPath("ulogd")
	if err != nil {
		t.Fatalf("%v: scripts/deps.sh brings it", err)
	}
	root := filepath.Dir(filepath.Dir(filepath.Dir(program)))
	for _, at := range []string{root, "/"} {
		if list, _ := filepath.Glob(filepath.Join(at, "usr/lib/*/ulogd")); len(list) > 0 {
			return list[0]
		}
	}
	t.Fatalf("no plugins of ulogd below %s or /usr/lib", root)
	return ""
}

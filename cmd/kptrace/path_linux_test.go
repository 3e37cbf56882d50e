package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kptrace/kptrace/lab/load"
)

// pathFlow is what tests read of a flow with paths.
type pathFlow struct {
	Client  struct{ Port int }
	Outcome string
	Reason  string
	Cause   string
	Packets []struct {
		Packet     int
		Name       string
		Incomplete bool
	}
	Path []struct {
		Packet               int
		Kind, Hook, Table    string
		Chain, Purpose, Text string
		Verdict              string
	}
	Evidence   []string
	Incomplete bool
}

func pathFlows(t *testing.T, text string) []pathFlow {
	t.Helper()
	var list []pathFlow
	for line := range strings.Lines(text) {
		var f pathFlow
		if err := json.Unmarshal([]byte(line), &f); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		list = append(list, f)
	}
	return list
}

// left is all that tracing of paths changes: rules of both flavours, sets, the
// sysctls of nf_log. iptables-legacy cannot remove a table, so an empty raw one is
// no difference.
func (w *world) left() string {
	w.t.Helper()
	var b strings.Builder
	for _, flavour := range []string{"nft", "legacy"} {
		text := save(w.t, w.ns, flavour)
		b.WriteString(strings.ReplaceAll(text, "*raw\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n", ""))
	}
	b.WriteString("sets: " + w.run("", "ipset", "list", "-n"))
	b.WriteString(strings.Join(regexp.MustCompile(`table .* kptrace.*`).FindAllString(w.run("", "nft", "list", "tables"), -1), " "))
	b.WriteString(w.run("", "cat", "/proc/sys/net/netfilter/nf_log/2", "/proc/sys/net/netfilter/nf_log/10"))
	return b.String()
}

func (w *world) dial(n int) {
	w.t.Helper()
	err := w.ns.Do(func() error {
		res, err := load.Run(within(w.t, time.Minute), load.Config{Target: netip.MustParseAddrPort("10.96.0.10:80"), Conns: n})
		if err == nil && len(res.Errors) > 0 {
			err = fmt.Errorf("%v", res.Errors)
		}
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// pathWorld is a running proxy with one Service.
func pathWorld(t *testing.T, flavour string, flags ...string) (w *world, p *child) {
	t.Helper()
	w = newWorld(t)
	w.serve(1, 2)
	w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1, 2)})
	p = w.proxy(append([]string{"--iptables-flavour", flavour}, flags...)...)
	w.synced(p)
	return w, p
}

// followPaths starts a follower of paths; it returns when they are traced and it
// reads.
func (w *world) followPaths(flags ...string) *child {
	w.t.Helper()
	count := func() (readers, followers int) {
		said := regexp.MustCompile(`(?s) (\d+) readers.* followers (\d+),`).FindStringSubmatch(w.must("status"))
		if said == nil {
			return 0, 0
		}
		readers, _ = strconv.Atoi(said[1])
		followers, _ = strconv.Atoi(said[2])
		return readers, followers
	}
	_, before := count()
	f := w.start("kptrace", append([]string{"follow", "svc/foo", "-n", "shop", "-o", "jsonl", "--packets", "1"}, flags...)...)
	eventually(w.t, 40*time.Second, "the follower reads", func() bool {
		readers, followers := count()
		return readers == followers && followers > before
	})
	return f
}

// TestPathsLeaveNothing follows paths, and ends in every way there is: the rules
// of both flavours, the sets and the sysctls are then as before.
func TestPathsLeaveNothing(t *testing.T) {
	t.Parallel()
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			t.Parallel()
			w, p := pathWorld(t, flavour, "--path-buffer", "1000000")
			unmade := w.left() // with the proxy's rules
			same := func(how string) {
				t.Helper()
				eventually(t, 15*time.Second, how+": nothing is left", func() bool { return w.left() == unmade })
			}
			traced := func(how string, out string) {
				t.Helper()
				list := pathFlows(t, out)
				if len(list) == 0 {
					t.Fatalf("%s: no connection", how)
				}
				for _, f := range list {
					if len(f.Packets) == 0 || f.Packets[0].Name != "SYN" || len(f.Path) < 8 {
						t.Errorf("%s: no path of a connection: %+v", how, f)
					}
				}
			}

			f := w.followPaths()
			if w.left() == unmade {
				t.Fatal("tracing changes nothing: this test would see nothing")
			}
			if flavour == "nft" && !strings.Contains(w.left(), "table ip kptrace-path") {
				t.Errorf("tracing does not begin before raw: %s", w.must("status"))
			}
			w.dial(3)
			time.Sleep(2 * time.Second)
			if code := f.stop(syscall.SIGINT); code != 0 {
				t.Errorf("Ctrl-C: exit %d: %s", code, f.err)
			}
			traced("Ctrl-C", f.out.String())
			same("Ctrl-C")

			f = w.followPaths("--for", "6s")
			w.dial(3)
			if code := f.end(20 * time.Second); code != 0 {
				t.Errorf("--for: exit %d: %s", code, f.err)
			}
			traced("--for", f.out.String())
			same("--for")

			f = w.followPaths()
			w.kill(f)
			same("kill -9 of the follower")

			// Two followers: the rules stay until the last one leaves.
			f, g := w.followPaths(), w.followPaths()
			w.kill(f)
			time.Sleep(500 * time.Millisecond)
			w.dial(2)
			time.Sleep(2 * time.Second)
			if g.stop(syscall.SIGINT); !strings.Contains(g.out.String(), `"SYN"`) {
				t.Errorf("the second follower lost its paths with the first: %s%s", g.out, g.err)
			}
			same("the last of two followers")

			// An overrun: the proxy stands still while reports come.
			f = w.followPaths()
			if err := p.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			w.dial(1000)
			if err := p.Signal(syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
			time.Sleep(3 * time.Second)
			if source := map[string]string{"nft": "nftrace", "legacy": "legacytrace"}[flavour]; !strings.Contains(w.must("status"), "events: "+source+", kernel") {
				t.Errorf("nothing was lost: no overrun was tested: %s", w.must("status"))
			}
			f.stop(syscall.SIGINT)
			same("an overrun")
			select {
			case <-p.Done():
				t.Fatalf("the proxy did not survive an overrun: %s", p.err)
			default:
			}

			// SIGTERM of the proxy leaves its own rules alone.
			f = w.followPaths()
			if code := p.stop(syscall.SIGTERM); code != 0 {
				t.Errorf("SIGTERM: exit %d: %s", code, p.err)
			}
			f.end(20 * time.Second)
			same("SIGTERM of the proxy")

			// kill -9 of the proxy: nothing is traced once the sets' entries time
			// out, and the next start removes the rest.
			p = w.proxy("--iptables-flavour", flavour)
			w.synced(p)
			f = w.followPaths()
			w.kill(p)
			f.end(20 * time.Second)
			if w.left() == unmade {
				t.Fatal("kill -9 left nothing: this test would see nothing")
			}
			eventually(t, 25*time.Second, "the sets are empty", func() bool {
				text := w.run("", "ipset", "list")
				return !strings.Contains(text, "tcp:")
			})
			p = w.proxy("--iptables-flavour", flavour)
			w.synced(p)
			same("the start after kill -9")

			f = w.followPaths()
			w.kill(p)
			f.end(20 * time.Second)
			w.must("cleanup")
			if text := w.left(); strings.Contains(text, "KPTRACE") || strings.Contains(text, "kptrace-") || strings.Contains(text, "nfnetlink_log") {
				t.Errorf("cleanup after kill -9 left:\n%s", text)
			}
		})
	}
}

// TestPathOfUntracked has somebody keep packets to a Service from connection tracking:
// whoever follows paths sees that, and by which rule, in both flavours.
func TestPathOfUntracked(t *testing.T) {
	t.Parallel()
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			t.Parallel()
			w, _ := pathWorld(t, flavour)
			w.run("", "iptables-"+flavour, "-w", "-t", "raw", "-A", "OUTPUT", "-d", "10.96.0.10/32", "-j", "CT", "--notrack")
			f := w.followPaths()
			if err := w.ns.Do(func() error {
				if c, err := net.DialTimeout("tcp", "10.96.0.10:80", 100*time.Millisecond); err == nil {
					c.Close()
					return errors.New("connected without connection tracking")
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			eventually(t, 30*time.Second, "it is shown", func() bool { return strings.Contains(f.out.String(), `"not-tracked"`) })
			f.stop(syscall.SIGINT)
			list := pathFlows(t, f.out.String())
			if len(list) != 1 || !strings.Contains(f.out.String(), "not tracked: raw says NOTRACK") || !strings.HasSuffix(list[0].Cause, "of raw/OUTPUT: -d 10.96.0.10/32 -j CT --notrack") {
				t.Errorf("shown: %s%s", f.out, f.err)
			}
		})
	}
}

// TestPathsOfABurst makes 4,000 connections while their paths are followed. Each
// is shown once; without a loss each has its path, and with one that is said.
func TestPathsOfABurst(t *testing.T) {
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			w, _ := pathWorld(t, flavour)
			f := w.followPaths()
			const n = 4000
			w.dial(n)
			eventually(t, time.Minute, "all connections are shown", func() bool { return strings.Count(f.out.String(), "\n") >= n })
			time.Sleep(time.Second)
			f.stop(syscall.SIGINT)
			list := pathFlows(t, f.out.String())
			seen, with := map[int]int{}, 0
			for i := range list {
				seen[list[i].Client.Port]++
				for _, p := range list[i].Packets {
					if p.Name == "SYN" && !p.Incomplete {
						with++
						break
					}
				}
			}
			t.Logf("%d connections shown, %d with the whole path of their SYN; %s", len(list), with, lastLine(f.err.String()))
			if len(list) != n {
				t.Errorf("%d connections shown, want %d", len(list), n)
			}
			lost := !strings.Contains(lastLine(f.err.String()), " 0 events lost")
			if with != n && !lost {
				t.Errorf("%d of %d connections without their path, and no loss is told: %s", n-with, n, lastLine(f.err.String()))
			}
		})
	}
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

// TestPathTree shows a path to people: the meaning first.
func TestPathTree(t *testing.T) {
	t.Parallel()
	w, _ := pathWorld(t, "nft")
	f := w.start("kptrace", "follow", "svc/foo", "-n", "shop", "-o", "path")
	f.await(f.err, "history since", 20*time.Second)
	w.dial(1)
	f.await(f.out, "SYN-ACK", 20*time.Second)
	f.stop(syscall.SIGINT)
	out := f.out.String()
	for _, want := range []string{
		"  SYN  10.0.0.1:", "cluster IP of shop/foo:http", "pick ", " of 2, p = 0.500", "DNAT to ", "{dst 10.96.0.10:80 → 10.0.1.",
		"| -d 10.96.0.10/32 -p tcp",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in:\n%s", want, out)
		}
	}
}

// TestPathsInNFTTables shows rules of a table that iptables does not, with their
// text, one that came while paths were followed included.
func TestPathsInNFTTables(t *testing.T) {
	t.Parallel()
	w, _ := pathWorld(t, "nft")
	table := func(name, dport string) {
		w.run("table inet "+name+" {\n\tchain out {\n\t\ttype filter hook output priority 10;\n\t\ttcp dport "+dport+
			" counter comment \"of "+name+"\"\n\t}\n}\n", "nft", "-f", "-")
	}
	table("guard", "{ 80, 8080 }")
	f := w.followPaths()
	met := func(name, text string) func() bool {
		return func() bool {
			w.dial(1)
			for _, flow := range pathFlows(t, completeLines(f.out.String())) {
				for _, h := range flow.Path {
					if h.Table == name && h.Chain == "out" && h.Hook == "output" && h.Purpose == "of "+name && strings.HasPrefix(h.Text, text) {
						return true
					}
				}
			}
			return false
		}
	}
	eventually(t, 30*time.Second, "the rule of the first table", met("guard", "tcp dport { 80, 8080 } counter comment"))
	table("later", "8080")
	eventually(t, 30*time.Second, "the rule of the second table", met("later", "tcp dport 8080 counter comment"))
	f.stop(syscall.SIGINT)
}

// TestPathsTellDrops drops what the node itself sends to an endpoint: the path ends
// there, the failure has that reason, and where the kernel lets us see it, the segment
// that is sent again says so.
func TestPathsTellDrops(t *testing.T) {
	t.Parallel()
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.run("", "iptables-"+flavour, "-w", "-I", "OUTPUT", "-p", "tcp", "--dport", "8080", "-j", "DROP")
			w.serve(1, 2)
			w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1, 2)})
			w.synced(w.proxy("--iptables-flavour", flavour))
			f := w.followPaths("--updates")
			err := w.ns.Do(func() error {
				if c, err := net.DialTimeout("tcp", "10.96.0.10:80", 2500*time.Millisecond); err == nil {
					c.Close()
					return errors.New("connected")
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			refused := strings.Contains(w.must("status"), "without the kernel's reasons for drops")
			again := func(f *pathFlow) bool {
				for _, h := range f.Path {
					if h.Kind == "socket" && strings.Contains(h.Purpose, "sent again") {
						return true
					}
				}
				return false
			}
			eventually(t, 30*time.Second, "the failure, its reason, and what was sent again", func() bool {
				for _, flow := range pathFlows(t, completeLines(f.out.String())) {
					if flow.Reason == "dropped-by-rule" && (refused || again(&flow)) {
						if flow.Cause != "rule 4 of filter/OUTPUT: -p tcp -m tcp --dport 8080 -j DROP" || refused && again(&flow) {
							t.Errorf("cause %q of %+v", flow.Cause, flow)
						}
						return true
					}
				}
				return false
			})
			f.stop(syscall.SIGINT)
		})
	}
}

// completeLines is text without a line that is still being written.
func completeLines(text string) string { return text[:strings.LastIndexByte(text, '\n')+1] }

package main

import (
	"encoding/binary"
	"os"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/umlguest/guesttest"
)

// ipvsState is what mode ipvs leaves in a network namespace beside rules.
func (w *world) ipvsState() (servers int, device, sets bool) {
	w.t.Helper()
	table := w.run("", "cat", "/proc/net/ip_vs")
	links := w.run("", "ip", "-o", "link")
	return strings.Count(table, "TCP ") + strings.Count(table, "UDP "), strings.Contains(links, "kube-ipvs0"), w.run("", "ipset", "list", "-name") != ""
}

// setting reads a sysctl of the namespace.
func (w *world) setting(name string) string {
	return strings.TrimSpace(w.run("", "cat", "/proc/sys/"+name))
}

// A proxy in mode ipvs: it says so, works, sets what it needs; a kill -9 leaves all
// of it, the next start takes over, Ctrl-C and cleanup undo it. A start in another
// mode takes away what this one left, and the other way round.
func TestModeIPVS(t *testing.T) {
	guesttest.Group(t, func(t *testing.T) {
		t.Run("life", func(t *testing.T) {
			w := newWorld(t)
			w.serve(1, 2)
			w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1, 2), "none.yaml": manifest("none", 11, 8080, "")})
			before := map[string]string{}
			for _, name := range []string{"net/ipv4/vs/conntrack", "net/ipv4/vs/expire_nodest_conn", "net/ipv4/ip_forward", "net/ipv4/conf/all/arp_ignore", "net/ipv4/conf/all/arp_announce"} {
				before[name] = w.setting(name)
			}
			start := func(flags ...string) *child {
				t.Helper()
				p := w.proxy(append([]string{"--iptables-flavour", "legacy", "--mode"}, flags...)...)
				w.synced(p)
				return p
			}
			running := func(p *child, mode string) {
				t.Helper()
				if !strings.Contains(p.err.String(), "Using "+mode+" Proxier") {
					t.Errorf("the log does not say %s:\n%s", mode, p.err)
				}
				if out := w.visit("10.96.0.10:80"); !strings.HasPrefix(out, "10.0.1.") {
					t.Errorf("mode %s: %q", mode, out)
				}
			}
			ipvsThere := func(want bool) {
				t.Helper()
				servers, device, sets := w.ipvsState()
				if (servers > 0) != want || device != want || sets != want {
					t.Errorf("%d virtual servers, device %t, sets %t; want %t", servers, device, sets, want)
				}
			}

			p := start("ipvs", "--ipvs-strict-arp", "--ipvs-scheduler", "wlc")
			running(p, "ipvs")
			ipvsThere(true)
			if w.setting("net/ipv4/vs/conntrack") != "1" || w.setting("net/ipv4/conf/all/arp_ignore") != "1" {
				t.Error("sysctls are not set")
			}
			w.kill(p)
			ipvsThere(true)
			p = start("ipvs")
			running(p, "ipvs")
			if got := w.run("", "cat", "/proc/net/ip_vs"); !strings.Contains(got, "rr") || strings.Contains(got, "wlc") {
				t.Errorf("taken over as\n%s", got)
			}
			// To iptables and back.
			w.kill(p)
			p = start("iptables")
			running(p, "iptables")
			for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
				if n, device, sets := w.ipvsState(); n == 0 && !device && !sets {
					break
				}
			}
			ipvsThere(false)
			if rules := w.run("", "iptables-legacy-save"); strings.Contains(rules, "IPVS") || strings.Contains(rules, "--match-set") {
				t.Errorf("rules of mode ipvs are left:\n%s", rules)
			}
			w.kill(p)
			p = start("ipvs")
			running(p, "ipvs")
			if rules := w.run("", "iptables-legacy-save"); strings.Contains(rules, "KUBE-SVC-") || strings.Contains(rules, "KUBE-NODEPORTS") {
				t.Errorf("rules of mode iptables are left:\n%s", rules)
			}
			// Ctrl-C undoes everything, and so does cleanup.
			undone := func() {
				t.Helper()
				ipvsThere(false)
				if rules := w.run("", "iptables-legacy-save"); strings.Contains(rules, "KUBE-") || strings.Contains(rules, "KPTRACE") {
					t.Errorf("rules are left:\n%s", rules)
				}
				for name, was := range before {
					if now := w.setting(name); now != was {
						t.Errorf("%s is %s, was %s", name, now, was)
					}
				}
			}
			if err := p.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
			<-p.Done()
			undone()
			p = start("ipvs", "--ipvs-strict-arp")
			_ = p.Signal(syscall.SIGKILL)
			<-p.Done()
			w.must("cleanup", "--iptables-flavour", "legacy")
			undone()
		})
		t.Run("seen", func(t *testing.T) {
			w := newWorld(t)
			w.serve(1, 2)
			w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1, 2)})
			w.synced(w.proxy("--iptables-flavour", "legacy", "--mode", "ipvs"))
			w.ipvsPath()
			w.ipvsStatus()
		})
		t.Run("unloaded", testUnloaded)
	})
}

// ipvsPath follows the way of a connection that a real IPVS balances: the rules
// before it, the pick as one hop, the rules behind it.
func (w *world) ipvsPath() {
	w.t.Helper()
	f := w.start("kptrace", "follow", "svc/foo", "-n", "shop", "-o", "path")
	f.await(f.err, "history since", time.Minute)
	w.dial(1)
	f.await(f.out, "SYN-ACK", time.Minute)
	f.stop(syscall.SIGINT)
	at, out := 0, f.out.String()
	for _, want := range []string{
		"round robin, 1 of 2", "  SYN  ", "output mangle", "| -m set --match-set KPTRACE-VIRTUAL dst,dst", "output nat", "KUBE-SERVICES",
		"IPVS sends it to 10.0.1.", "{dst 10.96.0.10:80 → 10.0.1.", "postrouting mangle", "| -m ipvs --ipvs -j NFLOG", "postrouting nat", "MASQUERADE",
	} {
		i := strings.Index(out[at:], want)
		if i < 0 {
			w.t.Fatalf("%q does not follow in:\n%s", want, out)
		}
		at += i
	}
}

// ipvsStatus looks at the virtual servers in status, and adds to one of others a
// server that is not reached by NAT, which check must find.
func (w *world) ipvsStatus() {
	w.t.Helper()
	w.dial(5)
	eventually(w.t, time.Minute, "status shows the servers with their connections", func() bool {
		out := w.must("status")
		return strings.Contains(out, "1 virtual servers with 2 servers, all by NAT") &&
			regexp.MustCompile(`10\.96\.0\.10:80/tcp +shop/foo:http.*, rr: 6 connections`).MatchString(out) &&
			regexp.MustCompile(`10\.0\.1\.1:8080 +NAT, weight 1: .* 3 connections`).MatchString(out)
	})
	if code, out, talk := w.kptrace("check"); code != 0 {
		w.t.Errorf("check of what is well: exit %d\n%s%s", code, out, talk)
	}
	w.ipvsOfOthers()
	eventually(w.t, time.Minute, "status shows theirs", func() bool {
		return strings.Contains(w.must("status"), "2 virtual servers with 4 servers, 2 not by NAT")
	})
	code, out, talk := w.kptrace("check")
	for _, want := range []string{"not-nat", "10.0.0.1:443", "10.9.0.1:443 by direct routing", "10.9.0.2:443 by tunnel"} {
		if code != 3 || !strings.Contains(out, want) {
			w.t.Errorf("check: exit %d, %q is not in\n%s%s", code, want, out, talk)
		}
	}
}

// ipvsOfOthers adds a virtual server 10.0.0.1:443 with one server by direct routing
// and one by a tunnel, as ipvsadm 1.24 would.
func (w *world) ipvsOfOthers() {
	w.t.Helper()
	const (
		set        = 64 + 1024 + 64 // IP_VS_BASE_CTL
		add        = set + 2
		addServer  = set + 7
		byTunnel   = 2
		byRouting  = 3
		everyBit   = 1<<32 - 1
		portInWord = 443<<8&0xffff | 443>>8 // in network order
	)
	le := binary.LittleEndian
	service := make([]byte, 44) // struct ip_vs_service_user
	le.PutUint16(service, syscall.IPPROTO_TCP)
	copy(service[4:], []byte{10, 0, 0, 1})
	le.PutUint16(service[8:], portInWord)
	copy(service[16:], "rr")
	le.PutUint32(service[40:], everyBit)
	err := w.ns.Do(func() error {
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_RAW, syscall.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer syscall.Close(fd)
		if err := syscall.SetsockoptString(fd, syscall.IPPROTO_IP, add, string(service)); err != nil {
			return err
		}
		for i, method := range []uint32{byRouting, byTunnel} {
			server := make([]byte, 24) // struct ip_vs_dest_user
			copy(server, []byte{10, 9, 0, byte(1 + i)})
			le.PutUint16(server[4:], portInWord)
			le.PutUint32(server[8:], method)
			le.PutUint32(server[12:], 1)
			if err := syscall.SetsockoptString(fd, syscall.IPPROTO_IP, addServer, string(service)+string(server)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// testUnloaded takes the module ip_vs away from under a proxy. It says so, the
// rules and sets stay, and when the module is back it all works again.
func testUnloaded(t *testing.T) {
	w := newWorld(t)
	w.serve(1, 2)
	w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1, 2)})
	p := w.proxy("--iptables-flavour", "legacy", "--mode", "ipvs", "--trace=false") // rules that ask for IPVS would hold it
	works := func() bool { return strings.HasPrefix(w.visit("10.96.0.10:80"), "10.0.1.") }
	eventually(t, time.Minute, "it works at first", works)
	// Nobody loads it again while it is away.
	b, err := os.ReadFile("/proc/sys/kernel/modprobe")
	if err != nil {
		t.Fatal(err)
	}
	loader := strings.TrimSpace(string(b))
	if err := os.Rename(loader, loader+".away"); err != nil {
		t.Fatal(err)
	}
	back := sync.OnceFunc(func() {
		if err := os.Rename(loader+".away", loader); err != nil {
			t.Error(err)
		}
	})
	defer back()
	eventually(t, time.Minute, "ip_vs is unloaded", func() bool {
		_ = w.ns.Do(func() error { return ipvsFlush() }) // no module, no need
		list, left := readFile(t, "/proc/modules"), false
		for line := range strings.Lines(list) {
			if name, _, _ := strings.Cut(line, " "); name == "xt_ipvs" || strings.HasPrefix(name, "ip_vs") {
				left = true
				_ = unix.DeleteModule(name, unix.O_NONBLOCK) // those that others use go later
			}
		}
		return !left
	})
	p.await(p.err, "the kernel has no IPVS: load the module ip_vs", time.Minute)
	if rules, sets := w.run("", "iptables-legacy-save"), w.run("", "ipset", "list"); !strings.Contains(rules, "KUBE-SERVICES") || !strings.Contains(sets, "10.96.0.10,tcp:80") {
		t.Errorf("the rest is not intact:\n%s\n%s", rules, sets)
	}
	back()
	eventually(t, time.Minute, "it works again", works)
	if w.setting("net/ipv4/vs/conntrack") != "1" {
		t.Error("the sysctls of IPVS are not set again")
	}
	if code := p.stop(syscall.SIGTERM); code != 0 {
		t.Errorf("it ended with %d:\n%s", code, p.err)
	}
}

// ipvsFlush removes all virtual servers of the calling thread's namespace.
func ipvsFlush() error {
	const flush = 64 + 1024 + 64 + 5 // IP_VS_SO_SET_FLUSH
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_RAW, syscall.IPPROTO_RAW)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	return syscall.SetsockoptString(fd, syscall.IPPROTO_IP, flush, "")
}

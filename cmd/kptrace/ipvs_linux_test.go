package main

import (
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

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
	})
}

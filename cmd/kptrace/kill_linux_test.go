package main

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kptrace/kptrace/internal/netns"
)

// foreign is what others have in the tables.
const foreign = `*mangle
:OTHERS - [0:0]
-A PREROUTING -m comment --comment "others: first" -j OTHERS
-A OTHERS -s 192.0.2.0/24 -j MARK --set-xmark 0x1/0x1
COMMIT
*nat
:OTHERS - [0:0]
-A PREROUTING -p tcp -m tcp --dport 9 -j OTHERS
-A POSTROUTING -s 192.0.2.0/24 -j MASQUERADE
-A OTHERS -d 192.0.2.7/32 -p tcp -j DNAT --to-destination 192.0.2.8:80
COMMIT
*filter
:INPUT ACCEPT [0:0]
:OTHERS - [0:0]
-A INPUT -s 192.0.2.0/24 -j OTHERS
-A FORWARD -s 192.0.2.0/24 -j DROP
-A OTHERS -p udp -m udp --dport 53 -j ACCEPT
COMMIT
`

// sysctls are those that kptrace changes.
func sysctlPaths() []string {
	return []string{"/proc/sys/net/ipv4/conf/all/route_localnet", "/proc/sys/net/netfilter/nf_conntrack_acct", "/proc/sys/net/netfilter/nf_conntrack_timestamp"}
}

// variant is one of many states of the folder.
func variant(r *rand.Rand) map[string]string {
	pick := func() []int {
		all := r.Perm(4)
		for i := range all {
			all[i]++
		}
		return all[:r.IntN(5)]
	}
	return map[string]string{
		"foo.yaml":    manifest("foo", 10, 8080, "", pick()...),
		"sticky.yaml": manifest("sticky", 11, 8080, "sessionAffinity: ClientIP, ", pick()...),
		"third.yaml":  manifest([]string{"a", "b", "c"}[r.IntN(3)], 12, 8080, "", pick()...),
	}
}

func (w *world) write(files map[string]string) {
	for name, text := range files {
		writeFile(w.t, filepath.Join(w.manifests, name), text)
	}
}

// desired is what the tables must be: the dry run's text, restored into a
// namespace that has only what others have.
func (w *world) desired(flavour string) string {
	w.t.Helper()
	ns, err := netns.New()
	if err != nil {
		w.t.Fatal(err)
	}
	defer ns.Close()
	text := w.must("proxy", "--manifests", w.manifests, "--node", "node1", "--dry-run")
	runIn(w.t, ns, foreign, "iptables-"+flavour+"-restore")
	runIn(w.t, ns, text, "iptables-"+flavour+"-restore", "--noflush")
	return save(w.t, ns, flavour)
}

func (w *world) kill(p *child) {
	w.t.Helper()
	if err := p.Signal(syscall.SIGKILL); err != nil {
		w.t.Fatalf("%v: %s", err, p.err)
	}
	<-p.Done()
}

// TestKill kills the proxy at random moments while the manifests change, and
// starts it again: one sync makes everything right. Then it ends in each of
// the ways that are in order.
func TestKill(t *testing.T) {
	t.Parallel()
	for flavour, rounds := range map[string]int{"nft": 20, "legacy": 20} {
		t.Run(flavour, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.run(foreign, "iptables-"+flavour+"-restore")
			before := save(t, w.ns, flavour)
			settings := w.run("", "cat", sysctlPaths()...)
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			r := rand.New(rand.NewPCG(seed, 0))
			w.write(variant(r))
			for round := range rounds {
				w.killOnce(flavour, r, round)
			}
			p := w.proxy("--iptables-flavour", flavour)
			w.synced(p)
			if code := p.stop(syscall.SIGTERM); code != 0 {
				t.Errorf("SIGTERM: exit %d: %s", code, p.err)
			}
			if diff := cmp.Diff(comparable(w.desired(flavour)), comparable(save(t, w.ns, flavour))); diff != "" {
				t.Errorf("SIGTERM did not leave the rules:\n%s", diff)
			}
			p = w.proxy("--iptables-flavour", flavour)
			w.synced(p)
			if code := p.stop(syscall.SIGINT); code != 0 {
				t.Errorf("Ctrl-C: exit %d: %s", code, p.err)
			}
			w.undone(flavour, before, settings)

			p = w.proxy("--iptables-flavour", flavour)
			w.synced(p)
			w.kill(p)
			if out := w.must("cleanup"); !strings.Contains(out, "gone") {
				t.Errorf("cleanup says %q", out)
			}
			w.undone(flavour, before, settings)
			w.must("cleanup")
			w.undone(flavour, before, settings)
		})
	}
}

// killOnce kills a proxy at a random moment, and looks at what the next one
// makes of it.
func (w *world) killOnce(flavour string, r *rand.Rand, round int) {
	w.t.Helper()
	p := w.proxy("--iptables-flavour", flavour)
	for end := time.Now().Add(time.Duration(r.IntN(400)) * time.Millisecond); time.Now().Before(end); {
		w.write(variant(r))
		time.Sleep(time.Duration(r.IntN(40)) * time.Millisecond)
	}
	w.kill(p)
	// Its children die with it; one that is in the middle of a commit, when
	// the kernel lets it.
	eventually(w.t, 2*time.Second, "nothing outlives the proxy", func() bool { return len(processes(w.ns)) == 0 })
	left := save(w.t, w.ns, flavour)
	time.Sleep(150 * time.Millisecond)
	if diff := cmp.Diff(left, save(w.t, w.ns, flavour)); diff != "" {
		w.t.Errorf("round %d: the rules changed after the proxy was dead:\n%s", round, diff)
	}
	w.write(variant(r))
	p = w.proxy("--iptables-flavour", flavour)
	w.synced(p)
	if diff := cmp.Diff(comparable(w.desired(flavour)), comparable(save(w.t, w.ns, flavour))); diff != "" {
		w.t.Errorf("round %d: after the first sync (-want +got):\n%s\n%s", round, diff, p.err)
	}
	w.kill(p)
}

// undone checks that nothing of kptrace is left.
func (w *world) undone(flavour, before, settings string) {
	w.t.Helper()
	now := save(w.t, w.ns, flavour)
	if diff := cmp.Diff(before, now); diff != "" {
		w.t.Errorf("rules are not as before (-want +got):\n%s", diff)
	}
	other := map[string]string{"nft": "legacy", "legacy": "nft"}[flavour]
	if text := save(w.t, w.ns, other); strings.Contains(text, "KUBE-") || strings.Contains(text, "KPTRACE") {
		w.t.Errorf("left in the other flavour:\n%s", text)
	}
	if got := w.run("", "cat", sysctlPaths()...); got != settings {
		w.t.Errorf("sysctls are %q, were %q", got, settings)
	}
	entries, _ := os.ReadDir(filepath.Join(w.dir, "run"))
	for _, e := range entries {
		w.t.Errorf("left: %s", e.Name())
	}
}

// TestKillLab kills the launcher of a lab: nothing of it outlives that, and
// the next lab starts as if there had been none.
func TestKillLab(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	up, dir := d.labUp(nil)
	if n := len(d.processes()); n < 10 {
		t.Fatalf("%d processes in the lab: %v", n, d.processes())
	}
	if err := up.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "all of the lab is gone", func() bool { return len(d.processes()) == 0 })
	// A dying process leaves its memory before its sockets.
	eventually(t, 5*time.Second, "nobody answers", func() bool {
		code, _, talk := d.kptrace("status")
		return code == 1 && strings.Contains(talk, "no kptrace runs here")
	})
	again := d.start("kptrace", "lab", "up", "--dir", dir, "--no-traffic")
	again.await(again.out, "End it by Ctrl-C", 30*time.Second)
	if _, err := d.get("http://10.96.0.10"); err != nil {
		t.Error(err)
	}
	d.must("lab", "down")
	if code := again.end(10 * time.Second); code != 0 {
		t.Errorf("lab up ended with %d: %s", code, again.err)
	}
	eventually(t, 5*time.Second, "all of the lab is gone", func() bool { return len(d.processes()) == 0 })
}

// processes lists the programs that know this desk by their environment.
func (d *desk) processes() []string {
	var list []string
	all, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, path := range all {
		if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), d.dir+"/") {
			cmd, _ := os.ReadFile(filepath.Dir(path) + "/cmdline")
			list = append(list, strings.ReplaceAll(string(cmd), "\x00", " "))
		}
	}
	return list
}

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestLockHeld has another program hold the lock of iptables-legacy for 30 s while
// Services come, change and go. What was there serves on; healthz, the log and the
// status say what is wrong; and once the lock is free all is as it should be.
func TestLockHeld(t *testing.T) {
	t.Parallel()
	const hold = 30 * time.Second
	w := newWorld(t)
	path := filepath.Join(w.dir, "xtables.lock")
	w.env = append(w.env, "XTABLES_LOCKFILE="+path)
	w.run(foreign, "iptables-legacy-restore")
	w.write(map[string]string{
		"stays.yaml": manifest("stays", 10, 8080, "", 1), "moves.yaml": manifest("moves", 11, 8080, "", 1), "goes.yaml": manifest("goes", 12, 8080, "", 1),
	})
	w.serve(1, 2)
	p := w.proxy("--iptables-flavour=legacy", "--iptables-sync-period=1s", "--healthz-bind-address=127.0.0.1:10256")
	w.synced(p)
	const healthz = "http://127.0.0.1:10256/healthz"
	w.gets(healthz, 200)

	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	before := save(t, w.ns, "legacy")
	w.write(map[string]string{"moves.yaml": manifest("moves", 11, 8080, "", 2)})
	answers := func(at, by string) bool { return w.visit(at) == by+":8080\n" }
	code := func() int { c, _, _ := w.get(healthz); return c }
	eventually(t, 60*time.Second, "healthz answers 503", func() bool { return code() == 503 })
	p.await(p.err, "xtables lock", 60*time.Second)
	eventually(t, 30*time.Second, "the status says why", func() bool { return strings.Contains(w.must("status"), "xtables lock") })
	// Two more changes of which no sync has anything to show.
	w.write(map[string]string{"comes.yaml": manifest("comes", 13, 8080, "", 2)})
	if err := os.Remove(filepath.Join(w.manifests, "goes.yaml")); err != nil {
		t.Fatal(err)
	}
	for time.Since(began) < hold {
		if got := code(); got != 503 && got != 0 {
			t.Fatalf("healthz answers %d while nothing can be programmed", got)
		}
		eventually(t, patient, "what was there serves", func() bool { return answers("10.96.0.10", "10.0.1.1") })
		time.Sleep(200 * time.Millisecond)
	}
	if now := save(t, w.ns, "legacy"); now != before {
		t.Errorf("the lock was not heeded; rules before:\n%s\nnow:\n%s", before, now)
	}
	held := time.Since(began)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	// The wait between tries has grown to 30 s at most.
	eventually(t, 2*time.Minute, "the Services as they are wanted", func() bool {
		now := save(t, w.ns, "legacy")
		return strings.Contains(now, "shop/comes:http cluster IP") && !strings.Contains(now, "shop/goes:http") &&
			answers("10.96.0.11", "10.0.1.2") && answers("10.96.0.13", "10.0.1.2") && answers("10.96.0.10", "10.0.1.1")
	})
	if diff := cmp.Diff(comparable(w.desired("legacy")), comparable(save(t, w.ns, "legacy"))); diff != "" {
		t.Errorf("rules (- wanted, + live):\n%s", diff)
	}
	eventually(t, 60*time.Second, "healthz answers 200", func() bool { return code() == 200 })
	eventually(t, 30*time.Second, "the status says no more of it", func() bool { return !strings.Contains(w.must("status"), "xtables lock") })
	t.Logf("held for %v; right again %v after it was free", held.Round(time.Millisecond), (time.Since(began) - held).Round(time.Millisecond))
}

package main

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/lab/load"
)

// stopFor is how long the proxy stands still.
const stopFor = 60 * time.Second

// TestStopped stops a proxy by SIGSTOP under load, beside one that goes on:
// to the kernel, and to those who connect, both are alike.
func TestStopped(t *testing.T) {
	t.Parallel()
	stopped, running := loaded(t), loaded(t)
	time.Sleep(time.Second)
	if err := stopped.proxied.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for _, after := range []time.Duration{stopFor / 2, stopFor} {
		time.Sleep(time.Until(began.Add(after)))
		stopped.alike(running, after)
	}
	if err := stopped.proxied.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	a, b := stopped.result(), running.result()
	if len(a.Errors)+len(b.Errors) > 0 || a.Done < b.Done*95/100 || b.Done < int(300*stopFor.Seconds()*9/10) {
		t.Errorf("connections: %+v beside the stopped proxy, %+v beside the other", a, b)
	}
	stopped.alike(running, stopFor+3*time.Second)
	running.counted(b.Done)
	stopped.counted(a.Done)
	// Both go on: what is new is shown, and what changes is programmed.
	for _, w := range []*loadedWorld{stopped, running} {
		follow := w.start("kptrace", "follow", "svc/foo", "-n", "shop", "--for", "3s", "-o", "jsonl")
		time.Sleep(500 * time.Millisecond)
		began := time.Now()
		w.must("lab", "load", "--target", "10.96.0.10:80", "--conns", "20", "--rate", "50")
		code, fresh := follow.end(20*time.Second), 0
		for _, f := range flows(t, follow.out.String()) {
			if f.Time.After(began) && f.Outcome == "closed" && f.Decision.Algorithm == "random" {
				fresh++ // others are of before, and became known just now
			}
		}
		if code != 0 || fresh != 20 {
			t.Errorf("follow afterwards: exit %d, %d of 20 new connections shown\n%s%.3000s", code, fresh, follow.err, follow.out)
		}
		writeFile(t, w.manifests+"/foo.yaml", manifest("foo", 10, 8080, "", 4))
		eventually(t, 5*time.Second, "the kernel follows the manifests", func() bool {
			code, _, _ := w.kptrace("lab", "load", "--target", "10.96.0.10:80", "--conns", "1")
			return code == 0 && strings.Contains(save(t, w.ns, "nft"), "--to-destination 10.0.1.4:8080") && !strings.Contains(save(t, w.ns, "nft"), "--to-destination 10.0.1.1:8080")
		})
	}
}

// loadedWorld is a world with a proxy, a follower, and load on Service foo.
type loadedWorld struct {
	*world
	proxied, follow, load *child
}

func loaded(t *testing.T) *loadedWorld {
	t.Helper()
	w := &loadedWorld{world: newWorld(t)}
	writeFile(t, w.manifests+"/foo.yaml", manifest("foo", 10, 8080, "", 1, 2))
	w.serve(1, 2)
	w.proxied = w.proxy("--iptables-flavour", "nft")
	w.synced(w.proxied)
	w.follow = w.start("kptrace", "follow", "svc/foo", "-n", "shop")
	w.follow.await(w.follow.err, "history since", 10*time.Second)
	w.load = w.start("kptrace", "lab", "load", "--target", "10.96.0.10:80", "--rate", "300",
		"--for", fmt.Sprint(stopFor+4*time.Second), "-o", "json")
	return w
}

func (w *loadedWorld) result() load.Result {
	w.t.Helper()
	var r load.Result
	if code := w.load.end(30 * time.Second); code != 0 {
		w.t.Fatalf("load ended with %d: %s", code, w.load.err)
	}
	if err := json.Unmarshal([]byte(w.load.out.String()), &r); err != nil {
		w.t.Fatal(err)
	}
	return r
}

func (w *loadedWorld) stats() (s conntrack.Stats) {
	w.t.Helper()
	err := w.ns.Do(func() error {
		c, err := conntrack.Open(conntrack.Config{})
		if err != nil {
			return err
		}
		defer c.Close()
		s, err = c.Stats()
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// alike compares the kernel's tables of two worlds.
func (w *loadedWorld) alike(o *loadedWorld, after time.Duration) {
	w.t.Helper()
	a, b := w.stats(), o.stats()
	differ := func() bool {
		return a.Entries < b.Entries*85/100 || a.Entries > b.Entries*115/100 || b.Entries < 1000
	}
	// A load that a busy machine holds up makes up for it: entries live for longer.
	for end := time.Now().Add(15 * time.Second); differ() && time.Now().Before(end); a, b = w.stats(), o.stats() {
		time.Sleep(200 * time.Millisecond)
	}
	if differ() {
		w.t.Errorf("after %v: %d conntrack entries, %d beside the other proxy", after, a.Entries, b.Entries)
	}
	if a.InsertFailed != b.InsertFailed || a.Drop != b.Drop || a.EarlyDrop != b.EarlyDrop {
		w.t.Errorf("after %v: %+v, beside the other proxy %+v", after, a, b)
	}
}

// counted ends the follower: it showed every connection, or says that events
// were lost.
func (w *loadedWorld) counted(made int) {
	w.t.Helper()
	time.Sleep(2 * time.Second)
	if code := w.follow.stop(syscall.SIGINT); code != 0 {
		w.t.Errorf("follow ended with %d: %s", code, w.follow.err)
	}
	shown := strings.Count(w.follow.out.String(), " closed ")
	footer := regexp.MustCompile(`\d+ connections?, \d+ failed, (\d+) events? lost`).FindStringSubmatch(w.follow.err.String())
	lost := w.status().Lost
	w.t.Logf("made %d, shown as closed %d, follow says %q, lost %+v", made, shown, footer, lost)
	switch {
	case footer == nil:
		w.t.Errorf("follow has no footer:\n%.2000s", w.follow.err)
	case shown < made && footer[1] == "0" && len(lost) == 0:
		w.t.Errorf("%d connections were made, %d shown, and nothing is said to be lost", made, shown)
	case shown > made:
		w.t.Errorf("%d connections were made, %d shown", made, shown)
	}
}

package main

import (
	"encoding/json"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kptrace/kptrace/lab"
)

// TestDemoUserspace runs the demo in userspace mode: the endpoint that refuses
// costs nobody a connection, the round is exact, and all was shown rightly.
func TestDemoUserspace(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	var s lab.Summary
	out := d.must("lab", "run", "--for", "6s", "-o", "json", "--mode", "userspace")
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if !s.OK() || s.Made < 40 {
		t.Errorf("made %d, summary %s", s.Made, out)
	}
	flaky := service(&s, "shop/flaky:http")
	if flaky == nil || flaky.Retried == 0 || flaky.Outcomes["closed"] != flaky.Connections {
		t.Errorf("flaky should be retried and never fail: %+v", flaky)
	}
	foo := service(&s, "shop/foo:http")
	if foo == nil || foo.Retried != 0 || len(foo.Endpoints) != 3 {
		t.Fatalf("foo: %+v", foo)
	}
	for _, e := range foo.Endpoints {
		if n := 3*e.Connections - foo.Connections; n < -3 || n > 3 {
			t.Errorf("the round is not even: %+v", foo.Endpoints)
		}
	}
	if n, ok := s.Lost["userspace"]; !ok || n != 0 {
		t.Errorf("lost: %v", s.Lost)
	}
}

// TestPathsThroughUserspace follows paths through the userspace proxy: the rules
// that the client's packet met, what the proxy did, an endpoint that refuses
// included, and the rules that its own packet met.
func TestPathsThroughUserspace(t *testing.T) {
	t.Parallel()
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			t.Parallel()
			const conns = 6
			w := newWorld(t)
			w.serve(1, 2)
			w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1, 2, 3)})
			w.synced(w.proxy("--mode", "userspace", "--iptables-flavour", flavour))
			f := w.followPaths()
			w.dial(conns)
			eventually(t, 30*time.Second, "all connections are shown", func() bool {
				return strings.Count(f.out.String(), "\n") >= conns
			})
			f.stop(syscall.SIGINT)

			refused := 0
			for _, flow := range pathFlows(t, f.out.String()) {
				var kinds, said []string
				var before, after bool
				for _, h := range flow.Path {
					if h.Packet != 1 {
						continue
					}
					if len(kinds) == 0 || kinds[len(kinds)-1] != h.Kind {
						kinds = append(kinds, h.Kind)
					}
					proxied := slices.Contains(kinds, "userspace")
					switch {
					case h.Kind == "userspace":
						said = append(said, h.Purpose)
					case h.Hook == "output" && proxied:
						after = true
					case h.Hook == "output" && h.Table == "nat" && h.Verdict == "jump":
						before = true
					}
				}
				all := strings.Join(said, "; ")
				if !before || !after || len(said) < 3 || !strings.HasPrefix(said[0], "accepted at ") || !strings.HasPrefix(said[1], "pick one of 3: ") ||
					!strings.Contains(said[len(said)-1], "established after ") {
					t.Errorf("hops %v, the proxy: %s\n%+v", kinds, all, flow)
				}
				if strings.Contains(all, "dial 10.0.1.3:8080: refused after ") && strings.Contains(all, "pick another: ") {
					refused++
				}
			}
			if refused == 0 {
				t.Errorf("no connection met the endpoint that refuses:\n%s", f.out)
			}
		})
	}
}

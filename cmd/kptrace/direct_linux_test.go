package main

import (
	"encoding/json"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kptrace/kptrace/exporters/text"
)

// TestDirect dials an endpoint by its own address: that is counted, shown to those
// who ask, and not taken for a connection to the Service.
func TestDirect(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"proxy", "agent"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.write(map[string]string{"foo.yaml": manifest("foo", 10, 8080, "", 1, 2)})
			w.serve(1, 2)
			if kind == "proxy" {
				w.synced(w.proxy())
			} else {
				w.others("nft")
				w.agent()
			}
			before := readers(w)
			shows := w.start("kptrace", "follow", "svc/foo", "-n", "shop", "--direct", "-o", "jsonl", "--updates")
			counts := w.start("kptrace", "follow", "svc/foo", "-n", "shop", "-o", "json")
			eventually(t, 20*time.Second, "both to follow", func() bool {
				return readers(w) == before+2
			})
			if w.visit("10.0.1.1:8080") == "" || w.visit("10.96.0.10") == "" {
				t.Fatal("no answers")
			}
			var direct *text.FlowJSON
			eventually(t, 20*time.Second, "the connection past the Service, and its end", func() bool {
				direct = nil
				for line := range strings.Lines(shows.out.String()) {
					var f text.FlowJSON
					if json.Unmarshal([]byte(line), &f) == nil && f.Service.Via == "direct" {
						direct = &f
					}
				}
				return direct != nil && direct.Outcome == "closed"
			})
			if direct.Service.Name != "foo" || direct.Service.IP != "10.0.1.1" || direct.Service.PortNumber != 8080 || direct.Backend == nil || direct.Backend.IP != "10.0.1.1" {
				t.Errorf("%+v", direct)
			}
			if code := shows.stop(syscall.SIGINT); code != 0 {
				t.Errorf("exit %d", code)
			}
			if want := "1 connection straight to endpoints, past the Service (1 of the node itself, as by probes)"; !strings.Contains(shows.err.String(), want) {
				t.Errorf("%q is not in:\n%s", want, shows.err)
			}
			counts.stop(syscall.SIGINT)
			var doc struct {
				Flows  []text.FlowJSON
				Direct struct{ Pods, Node, Elsewhere int }
			}
			if err := json.Unmarshal([]byte(counts.out.String()), &doc); err != nil {
				t.Fatalf("%v: %s", err, counts.out)
			}
			if len(doc.Flows) != 1 || doc.Flows[0].Service.Via != "ClusterIP" || doc.Direct.Node != 1 || doc.Direct.Pods+doc.Direct.Elsewhere != 0 {
				t.Errorf("%+v", doc)
			}
			if out := w.must("follow", "-A", "-o", "jsonl", "--since", "1h", "--for", "0s"); strings.Contains(out, `"direct"`) {
				t.Errorf("the history has it: %s", out)
			}
		})
	}
}

// readers is how many read what the node publishes.
func readers(w *world) int {
	var s struct{ Nodes []statusJSON }
	if err := json.Unmarshal([]byte(w.must("status", "-o", "json")), &s); err != nil || len(s.Nodes) != 1 {
		w.t.Fatalf("%v: %d nodes", err, len(s.Nodes))
	}
	return s.Nodes[0].Ring.Readers
}

// TestDirectWithHistory is refused, for the history has none.
func TestDirectWithHistory(t *testing.T) {
	d := newDesk(t)
	code, _, talk := d.kptrace("follow", "-A", "--direct", "--for", "0s", "--since", "1h")
	if code != 2 || !strings.Contains(talk, "--direct: connections past the Service are not kept") {
		t.Errorf("exit %d: %s", code, talk)
	}
}

package main

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// TestStack: a real Prometheus scrapes a real node with traffic and faults;
// every query of every panel and every rule has an answer, and the figures are
// those of the lab's clients and servers.
func TestStack(t *testing.T) {
	t.Parallel()
	c := newDesk(t).start("kptrace", "lab", "stack", "--check", "-o", "json")
	code := c.end(4 * time.Minute)
	var verdict struct {
		OK     bool
		Checks []struct {
			Name, Detail string
			OK           bool
		}
	}
	if err := json.Unmarshal([]byte(c.out.String()), &verdict); err != nil {
		t.Fatalf("%v\n%s\n%s", err, c.out, c.err)
	}
	names := ""
	for _, c := range verdict.Checks {
		names += c.Name + "\n"
		if !c.OK {
			t.Errorf("%s: %s", c.Name, c.Detail)
		}
	}
	for _, want := range []string{"figures of shop/foo", "figures of shop/dns", "queries", "rules", "promtool check metrics, node1"} {
		if !strings.Contains(names, want) {
			t.Errorf("no check %q in:\n%s", want, names)
		}
	}
	if !verdict.OK || code != 0 {
		t.Errorf("code %d\n%s", code, c.err)
	}
}

package main

import (
	"encoding/json"
	"testing"

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

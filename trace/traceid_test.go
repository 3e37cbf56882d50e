package trace

import "testing"

// TestTraceID pins the ids: they stand in stores of traces.
func TestTraceID(t *testing.T) {
	f := &Flow{Node: "node1", ID: 7}
	const want = "dc5f65cc5e4fa699563102c15a8408cf"
	if got := f.TraceID().String(); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	later := *f
	later.Revision++
	if later.TraceID() != f.TraceID() {
		t.Error("another revision has another id")
	}
	for _, other := range []*Flow{{Node: "node1", ID: 8}, {Node: "node2", ID: 7}, {ID: 7}} {
		if other.TraceID() == f.TraceID() {
			t.Errorf("%+v has the same id", other)
		}
	}
	if n := testing.AllocsPerRun(100, func() { _ = f.TraceID() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

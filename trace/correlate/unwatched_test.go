package correlate_test

import (
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

// TestUnwatched wants fewer updates while nobody looks, and the same flows.
func TestUnwatched(t *testing.T) {
	watched, counters, asked := false, false, 0
	var got []*trace.Flow
	x := newTraffic(func(c *correlate.Config) {
		c.Emit = func(f *trace.Flow) { got = append(got, f) }
		c.Watched = func() bool { return watched }
		c.Counters = func(f *trace.Flow) bool { return counters && f.Outcome == trace.Closed }
		c.Ask = func(conntrack.Tuple) bool { asked++; return true }
	})
	wait := func(d time.Duration) {
		x.now += int64(d)
		x.c.Advance(time.Unix(0, x.now))
	}
	x.connection()
	if len(got) != 0 {
		t.Errorf("a connection under way gave %d updates at once", len(got))
	}
	wait(60 * time.Millisecond)
	if len(got) != 1 || !got[0].Ended || got[0].Outcome != trace.Closed || asked != 0 {
		t.Fatalf("ended: %d updates, %d questions, %+v", len(got), asked, got)
	}
	orig, reply := x.tuples(0)
	x.entry(trace.KindDestroy, orig, reply)
	if len(got) != 2 || !got[1].Counted || got[1].ID != got[0].ID || got[1].Revision <= got[0].Revision {
		t.Fatalf("the counters: %d updates, %+v", len(got), got)
	}

	// One that lasts is told of within a second, in its latest state.
	got = got[:0]
	orig, reply = x.tuples(x.n)
	x.packet(trace.KindPick, orig)
	x.packet(trace.KindSynAck, reply)
	wait(1100 * time.Millisecond)
	if len(got) != 1 || got[0].Outcome != trace.Open || got[0].Established < 0 {
		t.Fatalf("open: %d updates, %+v", len(got), got)
	}
	if asked != 1 { // once, for what it has sent
		t.Errorf("open: %d questions", asked)
	}
	asked = 0
	// Who asks for all gets what is held back, too.
	x.n++
	orig, _ = x.tuples(x.n)
	x.packet(trace.KindPick, orig)
	n := 0
	x.c.Flows(func(*trace.Flow) bool { n++; return true })
	if n != 2 || len(got) != 2 || got[1].Outcome != trace.Pending {
		t.Fatalf("%d open, %d updates, %+v", n, len(got), got)
	}
	// An exporter wants the counters: they are asked for, and nothing else.
	counters = true
	x.n++
	got = got[:0]
	x.connection()
	wait(60 * time.Millisecond)
	if asked != 1 || len(got) != 0 {
		t.Errorf("exported: %d updates, %d questions", len(got), asked)
	}
	counters, asked = false, 0
	wait(300 * time.Millisecond)
	// Somebody looks: each change at once, and the counters are asked for.
	watched = true
	x.n++
	got = got[:0]
	x.connection()
	wait(60 * time.Millisecond)
	wait(300 * time.Millisecond)
	if len(got) < 3 || asked == 0 {
		t.Errorf("watched: %d updates, %d questions", len(got), asked)
	}
}

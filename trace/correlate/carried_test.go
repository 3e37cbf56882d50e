package correlate_test

import (
	"testing"
	"time"

	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

// TestCarried gives requests to their connections, whether they come after the
// decision or before, and to none else.
func TestCarried(t *testing.T) {
	var got []*trace.Flow
	x := newTraffic(func(c *correlate.Config) { c.Emit = func(f *trace.Flow) { got = append(got, f) } })
	wait := func(d time.Duration) {
		x.now += int64(d)
		x.c.Advance(time.Unix(0, x.now))
	}
	request := func(n byte) trace.Carried {
		q := trace.Carried{Time: time.Unix(0, x.now)}
		q.Trace[0], q.Span[0], q.Flags = n, n, trace.FlagSampled
		return q
	}
	orig, reply := x.tuples(x.n)
	// The pick is read later than the request that follows it.
	x.packet(trace.KindPick, orig)
	pickLess := request(1)
	x.c.Carried(orig, pickLess)
	x.packet(trace.KindSynAck, reply)
	wait(time.Second)
	x.c.Carried(orig, request(2)) // kept alive
	x.packet(trace.KindFin, orig)
	x.packet(trace.KindFin, reply)
	wait(100 * time.Millisecond)
	last := got[len(got)-1]
	if !last.Ended || len(last.Carried) != 2 || last.Carried[0] != pickLess || last.Carried[1].Trace[0] != 2 || last.TraceID() != pickLess.Trace {
		t.Fatalf("%+v", last)
	}
	if len(got[0].Carried) > 1 {
		t.Errorf("an earlier update has changed: %+v", got[0])
	}

	// Before the pick, by the time it was read.
	x.n++
	orig, reply = x.tuples(x.n)
	early := request(3)
	early.Time = early.Time.Add(time.Millisecond)
	x.c.Carried(orig, early)
	x.packet(trace.KindPick, orig)
	x.packet(trace.KindSynAck, reply)
	wait(time.Second)
	if f := got[len(got)-1]; f.Tuple != orig || len(f.Carried) != 1 || f.Carried[0] != early {
		t.Errorf("early: %+v", f)
	}
	// More than a flow keeps are counted.
	for range trace.MaxCarried + 4 {
		x.c.Carried(orig, request(4))
	}
	wait(time.Second)
	if f := got[len(got)-1]; len(f.Carried) != trace.MaxCarried || f.CarriedMore != 5 || f.Carried[0] != early {
		t.Errorf("many: %d and %d more", len(f.Carried), f.CarriedMore)
	}
	// Nobody's.
	x.n++
	orig, _ = x.tuples(x.n)
	x.c.Carried(orig, request(5))
	wait(time.Second)
	if s := x.c.Stats(); s.Carried != 2+1+trace.MaxCarried+4 || s.CarriedLate != 1 {
		t.Errorf("stats %+v", s)
	}
}

package ctevent

import (
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// Entry makes the Event of an entry that a dump or a question found at the
// given time, which is our clock.
func Entry(f conntrack.Flow, at time.Time) trace.Event {
	return trace.Event{
		Kind: trace.KindEntry, Source: trace.Conntrack, Time: at.UnixNano(),
		Tuple: f.Orig, Reply: f.Reply, CTID: f.ID, Status: f.Status, TCPState: f.State,
		Timeout: uint32(f.Timeout / time.Second), Mark: f.Mark, Out: f.Out, In: f.In,
		Start: nanos(f.Start), Stop: nanos(f.Stop),
	}
}

// Gone makes the Event that says that the entry asked about, by its original
// tuple and id, did not exist at the given time.
func Gone(orig conntrack.Tuple, id uint32, at time.Time) trace.Event {
	return trace.Event{
		Kind: trace.KindGone, Source: trace.Conntrack, Time: at.UnixNano(), Tuple: orig, CTID: id,
	}
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

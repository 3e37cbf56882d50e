package correlate

import (
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// resentAfter is how long it takes at least until a segment that was not acknowledged is
// sent again (TCP_RTO_MIN of Linux is 200 ms).
const resentAfter = int64(150 * time.Millisecond)

// invalid is what is known of segments of a connection that connection tracking took
// for INVALID.
type invalid struct {
	// seq is the last one's number, at when it was first seen.
	seq       uint32
	at        int64
	fromReply bool
	// asked says that Config.Inquire was told, cause is what was found out.
	asked bool
	cause string
}

// invalidSegment notes one. A single segment out of the window, or a late one, means
// nothing; one that is sent again as INVALID as before does not get through. Who can
// tell whether a rule drops it is asked.
func (c *Correlator) invalidSegment(e *trace.Event) {
	if e.Hook != hookForward || e.Tuple.Proto() != conntrack.TCP {
		return
	}
	r := c.keys[e.Tuple]
	if r == nil {
		c.stats.foreign.Add(1)
		return
	}
	for r.newer != nil {
		r = r.newer
	}
	if r = latest(r); r == nil || r.relayed || r.endAt != 0 || r.phase != open && !r.entryTaken() {
		c.stats.late.Add(1)
		return
	}
	x := &r.invalid
	fromReply := e.Tuple != r.orig
	if x.at == 0 || x.seq != e.TCPSeq || x.fromReply != fromReply {
		x.seq, x.at, x.fromReply = e.TCPSeq, e.Time, fromReply
		return
	}
	if x.asked || e.Time-x.at < resentAfter || c.cfg.Inquire == nil {
		return
	}
	x.asked = true
	f := c.edit(r)
	f.Evidence = f.Evidence.With(e.Source)
	c.emit(r)
	c.cfg.Inquire(Inquiry{Flow: r.f, Invalid: e.Tuple})
	c.arm(r)
}

// entryTaken reports whether a connection is taken for ended only because its entry was
// removed while it was established.
func (r *rec) entryTaken() bool {
	return r.phase == ended && r.goneEarly && r.goneState == conntrack.TCPEstablished && r.f.Outcome == trace.Unknown
}

package correlate

import (
	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// holdOver decides about what waited for the other source for long enough.
func (c *Correlator) holdOver(r *rec) {
	if r.phase == held {
		c.judge(r)
		return
	}
	waited := r.replyWait
	if waited {
		orig := r.orig
		r.replyWait = false
		if c.release(r); r.phase == free || r.orig != orig {
			return
		}
	}
	switch {
	case r.phase >= closing:
	case r.destroyed:
		c.decideByDestroy(r, r.superseded)
	case r.gone:
		c.decideBlind(r, missingFin)
	case r.superseded:
		c.succeed(r, c.now)
	case waited && !r.newSeen:
		c.ask(r)
	}
}

// judge shows a held record without a decision, if it belongs to a Service.
func (c *Correlator) judge(r *rec) {
	f := r.f
	if r.direct {
		c.nameDirect(r)
	} else if !c.untranslatedEntry(r) && !c.elsewhereEntry(r) && !c.recognise(f, r.seenTime, f.Reply, r.goneStatus&conntrack.SrcNAT != 0) {
		c.stats.foreign.Add(1)
		c.remove(r)
		return
	}
	if o := latest(r.older); o != nil && o.phase < ended {
		c.succeed(o, c.now)
	}
	f.Existing = r.existing
	if !r.direct {
		f.Decision.Note = "pick not seen"
	}
	if r.existing {
		f.Decision.Note = "before start"
		r.startUnknown = r.newTime == 0
	}
	if r.elsewhere {
		f.Decision.Note = "sent to what is no endpoint"
	}
	if c.cfg.EntriesDecide && !r.existing && !r.elsewhere && !r.direct {
		c.decideByEntry(f, r.seenTime)
	}
	f.Decision.SourceSeen = f.Reply.Dst()
	r.lastSyn = r.seenTime
	if r.goneStatus&conntrack.SeenReply != 0 {
		r.answered = true
	}
	a := trace.Attempt{Endpoint: f.Backend, Outcome: tryPending, Latency: -1}
	if r.answered {
		a.Outcome = tryEstablished
	}
	r.try(a)
	switch {
	case r.existing:
	case r.newTime != 0:
		r.keptSince = r.newTime
	default: // when it was read
		r.keptSince = r.seenTime - int64(c.cfg.Hold)
	}
	c.setReply(r, f.Reply, false)
	c.release(r)
	r.settle()
	c.identify(r)
	c.begin(r, c.now)
	if r.destroyed && r.phase != closing {
		r.holdDue = c.now + int64(c.cfg.Hold)
	}
	c.publish(r)
	if o := r.newer; o != nil && (o.picked || o.shown) && r.phase < ended {
		c.succeed(r, c.now)
	}
}

// overByEntry ends a connection by what its entry says, where no packet told.
func (c *Correlator) overByEntry(r *rec, e *trace.Event) {
	r.goneState = e.TCPState
	c.decideByDestroy(r, true)
}

// decideByDestroy ends a flow whose end no packet told, by what its entry was
// when it went. An unanswered connection whose entry was removed early is left
// to try again, unless forced.
func (c *Correlator) decideByDestroy(r *rec, forced bool) {
	f := c.edit(r)
	answered := r.answered || r.goneStatus&conntrack.SeenReply != 0
	if r.f.Counted && f.In.Packets > 0 {
		answered = true
	}
	switch {
	case !r.tcp() && answered:
		r.idleSince()
		last(f).Outcome = tryEstablished
		c.end(r, trace.Closed, trace.NoReason, "")
	case !r.tcp():
		last(f).Outcome = tryTimeout
		c.end(r, trace.Timeout, trace.NoReply, "")
	case answered && r.goneState == conntrack.TCPSynRecv && !r.goneEarly && r.lostReplies > 0:
		// The client sent its SYN again, and nobody acknowledged the answer, or
		// turned it down.
		last(f).Outcome = tryTimeout
		c.end(r, trace.Timeout, trace.ReplyLost, "")
	case answered:
		last(f).Outcome = tryEstablished
		switch r.goneState {
		case conntrack.TCPFinWait, conntrack.TCPCloseWait, conntrack.TCPLastAck, conntrack.TCPTimeWait:
			c.end(r, trace.Closed, trace.NoReason, missingFin)
		case conntrack.TCPClose:
			if f.Counted && f.Out.Packets == 1 && f.In.Packets == 1 && !r.answered {
				// The only answer to the SYN closed it.
				last(f).Outcome = tryRefused
				c.end(r, trace.Refused, trace.EndpointRefused, missingRst)
				return
			}
			last(f).Outcome = tryReset
			c.end(r, trace.Reset, trace.NoReason, missingRst)
		case conntrack.TCPEstablished:
			if !r.goneEarly && !r.f.Incomplete {
				c.end(r, trace.Closed, trace.IdleExpired, missingFin)
				return
			}
			fallthrough
		default:
			missing := missingFin
			if r.goneEarly {
				missing = "the end: the conntrack entry was removed"
			}
			c.end(r, trace.Unknown, trace.NoReason, missing)
		}
	case r.goneState == conntrack.TCPClose && r.goneEarly:
		last(f).Outcome = tryRefused
		c.end(r, trace.Refused, trace.EndpointRefused, missingRst)
	case r.goneEarly && !forced:
		r.destroyed, r.newSeen, r.counted = false, false, false
		f.Counted, f.Out, f.In = false, conntrack.Counters{}, conntrack.Counters{}
		c.later(r)
	default:
		last(f).Outcome = tryTimeout
		c.end(r, trace.Timeout, trace.SynUnanswered, "")
	}
}

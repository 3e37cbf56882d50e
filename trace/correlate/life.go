package correlate

import (
	"strings"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

const (
	missingAnswer = "the answer: events were lost"
	missingReport = "the answer: no rule tells of it, and the entry was not asked"
	missingEntry  = "the conntrack entry, without which answers cannot be told"
	missingFin    = "fin not seen"
	missingRst    = "rst not seen"
)

// last returns the attempt in use of an update being written.
func last(f *trace.Flow) *trace.Attempt {
	if n := len(f.Attempts); n > 0 {
		return &f.Attempts[n-1]
	}
	return new(trace.Attempt)
}

// retransmit notes a SYN after the first.
func (c *Correlator) retransmit(r *rec, e *trace.Event) {
	f := c.edit(r)
	f.Evidence = f.Evidence.With(e.Source)
	r.lastSyn = e.Time
	if r.isn == 0 {
		r.isn = e.TCPSeq
	}
	a := last(f)
	a.Retransmits++
	a.Resent = time.Duration(max(0, e.Time-r.tryBegan()))
	if r.phase != pending {
		c.retriedAfterAnswer(r, e)
		c.later(r)
		return
	}
	if f.Outcome != trace.Pending {
		// It proves that nothing answered, whatever was lost.
		c.unanswered(r, f)
	} else if e.Time-r.start >= int64(c.cfg.UnansweredAfter) {
		c.unanswered(r, f)
	}
	c.publish(r)
}

func (c *Correlator) unanswered(r *rec, f *trace.Flow) {
	f.Outcome, f.Reason, f.Missing = trace.Unanswered, noAnswer(r), ""
	if a := last(f); a.Outcome == tryPending {
		a.Outcome = tryUnanswered
	}
	if r.tcp() {
		r.stateDue = r.lastSyn + int64(c.cfg.GiveUpAfter)
	}
}

func noAnswer(r *rec) trace.Reason {
	if r.tcp() {
		return trace.SynUnanswered
	}
	return trace.NoReply
}

// answer notes the SYN-ACK or the first datagram back.
func (c *Correlator) answer(r *rec, e *trace.Event) {
	if r.answered && (r.answerAt != 0 || r.phase == closing) {
		return
	}
	f := c.edit(r)
	f.Evidence = f.Evidence.With(e.Source)
	r.answerAt, r.answerDevice, r.large.answerSeq = e.Time, e.InDev, e.TCPSeq
	c.answeredNow(r, f, e.Time)
	c.publish(r)
}

// answeredNow makes a flow an open one.
func (c *Correlator) answeredNow(r *rec, f *trace.Flow, now int64) {
	r.answered = true
	if r.told == trace.ReplyBypassed { // not this one
		r.settled, r.told = false, trace.NoReason
	}
	last(f).Outcome = tryEstablished
	f.Reason, f.Missing = trace.NoReason, ""
	r.settle()
	if r.phase == pending || r.phase == open {
		r.phase = open
		f.Outcome = trace.Open
		r.stateDue = c.idleDue(r, now)
		if r.tcp() && r.picked && !r.relayed && r.answerAt != 0 && r.stateDue != 0 {
			r.large.lookDue = now + firstLook
			r.stateDue = min(r.stateDue, r.large.lookDue)
		}
	}
}

// fin notes a FIN: the first one ends the connection.
func (c *Correlator) fin(r *rec, e *trace.Event, fromReply bool) {
	if fromReply && r.finIn || !fromReply && r.finOut {
		return
	}
	first := r.endAt == 0
	if fromReply {
		r.finIn = true
	} else {
		r.finOut = true
	}
	if !first {
		if r.phase == closing && r.finIn && r.finOut && !r.asked {
			r.stateDue = e.Time + settleWait
		}
		return
	}
	f := c.edit(r)
	f.Evidence = f.Evidence.With(e.Source)
	if !r.answered {
		// Its SYN-ACK was not seen, but there must have been one.
		r.answered = true
		last(f).Outcome = tryEstablished
	}
	r.endAt = e.Time
	r.unacknowledged(e, fromReply)
	c.close(r, trace.Closed, trace.NoReason, e.Time+finWait)
}

// close sets how a connection ended, and waits for its counters.
func (c *Correlator) close(r *rec, o trace.Outcome, why trace.Reason, due int64) {
	f := c.edit(r)
	f.Outcome, f.Reason, f.Missing = o, why, ""
	r.settle()
	if r.phase == held {
		return // the pick or the end of the hold comes first
	}
	r.phase, r.stateDue, r.flushDue, r.holdDue = closing, due, 0, 0
}

// rst notes an RST.
func (c *Correlator) rst(r *rec, e *trace.Event, fromReply bool) {
	if r.endAt != 0 {
		if !r.asked && r.phase == closing {
			r.finIn, r.finOut = true, true
			r.stateDue = min(r.stateDue, e.Time+settleWait)
		}
		return
	}
	if !fromReply && !r.answered && r.picked && r.isn != 0 && e.TCPSeq != r.isn && e.TCPSeq != r.isn+1 {
		// It is about an acknowledgement of what its endpoint remembers of an older
		// connection (RFC 9293, 3.10.7.3). The SYN is sent again.
		return
	}
	f := c.edit(r)
	f.Evidence = f.Evidence.With(e.Source)
	// A refusal acknowledges the SYN and nothing else (RFC 9293, 3.10.7).
	refusal := !r.answered && (r.isn == 0 || e.TCPAck == 0 || e.TCPAck == r.isn+1)
	switch {
	case refusal && fromReply:
		c.byNode(r, e, trace.DroppedByRule)
		r.endAt = e.Time
		last(f).Outcome = tryRefused
		c.end(r, trace.Refused, trace.EndpointRefused, "")
	case refusal && r.picked:
		// It got an ACK for something else, of an endpoint that remembers an
		// earlier connection of these ports. It sends its SYN again at once,
		// which may be picked for anew.
		c.unanswered(r, f)
		c.publish(r)
	default:
		r.answered, r.endAt = true, e.Time
		r.finIn, r.finOut = true, true
		r.unacknowledged(e, fromReply)
		why := trace.ResetByClient
		if fromReply {
			why = trace.ResetByEndpoint
		}
		last(f).Outcome = tryReset
		c.close(r, trace.Reset, why, e.Time+settleWait)
	}
}

// icmp notes an ICMP error about a request.
func (c *Correlator) icmp(r *rec, e *trace.Event) {
	text, port, fatal := icmpError(e)
	if !fatal || r.endAt != 0 {
		return
	}
	f := c.edit(r)
	f.Evidence = f.Evidence.With(e.Source)
	a := last(f)
	a.ICMP = text
	if r.answered {
		c.later(r)
		return
	}
	r.endAt = e.Time
	switch {
	case port, strings.HasPrefix(text, "administratively"):
		c.byNode(r, e, trace.DroppedByRule)
	case strings.HasPrefix(text, "net unreachable"):
		c.byNode(r, e, trace.NoRoute)
	case strings.HasPrefix(text, "host unreachable"): // no route, or no neighbour
		c.byNode(r, e, trace.Unreachable)
	}
	why := trace.Unreachable
	a.Outcome = tryUnreachable
	if port {
		why, a.Outcome = trace.EndpointRefused, tryRefused
	}
	c.end(r, trace.Refused, why, "")
}

// end makes an outcome final without waiting for counters. A record still held
// keeps it for when it is shown.
func (c *Correlator) end(r *rec, o trace.Outcome, why trace.Reason, missing string) {
	f := c.edit(r)
	f.Outcome, f.Reason, f.Missing = o, why, missing
	r.settle()
	if r.phase != held {
		c.finish(r)
	}
}

// finish makes an update the final one. The record stays for the counters that
// the DESTROY brings, unless they are known or never will be.
func (c *Correlator) finish(r *rec) {
	f := c.edit(r)
	f.Ended, f.Completed = true, true
	if r.tooLarge == "" && r.counted {
		r.unacked = r.stuck()
	}
	if !r.counted && !r.relayed {
		// What an earlier look at the entry showed is not the whole.
		f.Counted, f.Out, f.In = false, conntrack.Counters{}, conntrack.Counters{}
	}
	c.stats.outcome(f.Outcome)
	r.phase, r.replyWait, r.asked = ended, false, false
	r.holdDue = 0
	c.publish(r)
	c.remember(r)
	kept := endedKept
	if r.over() {
		if !r.relayed || !r.inquired {
			c.remove(r)
			return
		}
		kept = inquiryWait
	}
	c.live.drop(r)
	c.done.push(r)
	c.dropReply(r)
	r.stateDue = c.now + kept
	c.arm(r)
}

// over reports whether nothing more can come for an ended record. A NEW that
// is still to come would otherwise be taken for another connection: an answer
// of the kernel can be quicker than the event on a busy machine.
func (r *rec) over() bool {
	if r.refused || r.f.Reason == trace.IdleExpired || r.entryTaken() { // what goes on after that has an entry too
		return false
	}
	return r.destroyed || r.counted && !r.halfClosed && (r.newArrived != 0 || r.existing)
}

// idleSince lets a UDP flow have ended with the last packet known.
func (r *rec) idleSince() {
	if r.orig.Proto() == conntrack.UDP {
		r.endAt = r.lastEvent
	}
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

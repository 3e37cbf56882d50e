package correlate

import (
	"slices"
	"time"

	"github.com/kptrace/kptrace/trace"
)

// The words of Attempt.Outcome.
const (
	tryPending     = "pending"
	tryEstablished = "established"
	tryRefused     = "refused"
	tryUnreachable = "unreachable"
	tryReset       = "reset"
	tryUnanswered  = "unanswered"
	tryTimeout     = "timeout"
)

// box is one update with room for its only attempt, so that most updates are
// one allocation.
type box struct {
	flow trace.Flow
	one  [1]trace.Attempt
}

// edit returns the next update of r to write to.
func (c *Correlator) edit(r *rec) *trace.Flow {
	if r.dirty {
		return r.f
	}
	b := new(box)
	b.flow = *r.f
	if len(r.f.Attempts) == 1 {
		b.one[0] = r.f.Attempts[0]
		b.flow.Attempts = b.one[:1:1]
	} else {
		b.flow.Attempts = slices.Clone(r.f.Attempts)
	}
	b.flow.Revision++
	b.flow.Completed = false
	r.b, r.f, r.dirty = b, &b.flow, true
	return r.f
}

// try adds an attempt to an update being written.
func (r *rec) try(a trace.Attempt) {
	if len(r.f.Attempts) == 0 {
		r.b.one[0] = a
		r.f.Attempts = r.b.one[:1:1]
		return
	}
	r.f.Attempts = append(r.f.Attempts, a)
}

// publish emits the update being written, if any, or soon if nobody looks.
func (c *Correlator) publish(r *rec) {
	if r.dirty && (r.phase == pending || r.phase == open) && !r.f.Outcome.Failed() && !c.cfg.Watched() {
		c.show(r)
		if r.flushDue == 0 {
			r.flushDue = c.now + unwatchedWait
		}
		c.arm(r)
		return
	}
	c.emit(r)
}

// show counts a flow as shown from now on.
func (c *Correlator) show(r *rec) {
	if !r.shown {
		r.shown = true
		c.stats.flows.Add(1)
	}
}

// emit emits the update being written, if any.
func (c *Correlator) emit(r *rec) {
	r.flushDue = 0
	if !r.dirty || !r.shown && r.phase == held {
		return
	}
	if !r.f.Incomplete {
		to := c.now
		if r.phase >= closing && r.endAt != 0 {
			to = r.endAt
		}
		r.f.Incomplete = c.losses.overlap(r.start, to)
	}
	c.cause(r)
	c.show(r)
	r.dirty = false
	c.stats.emitted.Add(1)
	c.cfg.Emit(r.f)
}

// later publishes a minor change within Config.Hold, unless something else
// does before.
func (c *Correlator) later(r *rec) {
	if r.shown && r.dirty && r.flushDue == 0 {
		r.flushDue = c.now + int64(c.cfg.Hold)
		c.arm(r)
	}
}

// identify gives a flow its ID: the milliseconds of its start, and a sequence
// number within 22 bits.
func (c *Correlator) identify(r *rec) {
	if r.f.ID == 0 {
		c.sequence++
		r.f.ID = trace.FlowID(uint64(r.start/1e6)<<22 | c.sequence&(1<<22-1))
	}
}

// settle recomputes all times of an update being written. A pick on the OUTPUT
// hook has no kernel time, only that of its reading some milliseconds later;
// there the creation of the entry is the better start.
func (r *rec) settle() {
	f := r.f
	switch {
	case r.pickTime != 0 && (r.pickExact || r.newTime == 0 || r.newTime > r.pickTime || r.pickTime-r.newTime > int64(5*time.Second)):
		r.start = r.pickTime
	case r.newTime != 0:
		r.start = r.newTime
	default:
		r.start = r.seenTime
	}
	f.Start = when(r.start)
	if r.answerAt != 0 && !r.startUnknown {
		f.Established = time.Duration(max(0, r.answerAt-r.start))
	}
	if r.endAt != 0 && !r.startUnknown {
		f.Duration = time.Duration(max(0, r.endAt-r.start))
	}
	switch n := len(f.Attempts); n {
	case 0:
	case 1:
		r.tryStart = r.start
		f.Attempts[0].Start = f.Start
		fallthrough
	default:
		a := &f.Attempts[n-1]
		switch {
		case r.startUnknown, r.relayed && r.answerAt == 0:
		case a.Outcome == tryRefused || a.Outcome == tryUnreachable:
			a.Latency = time.Duration(max(0, r.endAt-r.tryStart))
		case r.answerAt != 0:
			a.Latency = time.Duration(max(0, r.answerAt-r.tryStart))
		}
	}
}

func when(ns int64) time.Time { return time.Unix(0, ns).UTC() }

package correlate

import (
	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// idleDue is when an open flow's entry is asked for.
func (c *Correlator) idleDue(r *rec, now int64) int64 {
	if c.cfg.Ask == nil {
		return 0
	}
	if r.orig.Proto() == conntrack.UDP {
		return now + udpExpiry
	}
	least := int64(c.cfg.IdleAfter)
	if r.unreported() {
		least = min(least, directAsk) // no rule need report its end
	}
	r.askEvery = min(max(r.askEvery*2, least), askMost)
	return now + r.askEvery
}

func (c *Correlator) ask(r *rec) bool {
	if c.cfg.Ask == nil || !c.cfg.Ask(r.orig) {
		return false
	}
	c.stats.asked.Add(1)
	return true
}

// stateOver runs the timer of a phase.
func (c *Correlator) stateOver(r *rec, now int64) {
	switch r.phase {
	case pending:
		c.pendingOver(r, now)
	case open:
		if c.look(r, now) {
			r.stateDue = max(now+1, r.lastEvent+r.askEvery)
		} else if idle := r.lastEvent + r.askEvery; r.askEvery != 0 && idle > now {
			r.stateDue = idle
		} else if c.ask(r) {
			r.stateDue = c.idleDue(r, now)
		} else if c.cfg.Ask != nil {
			r.stateDue = now + askAgain
		}
	case closing:
		if !r.asked && !r.counted && (c.cfg.Watched() || c.cfg.Counters(r.f) || r.large.suspect) && c.ask(r) {
			r.asked = true
			r.stateDue = now + askWait
			return
		}
		c.finish(r)
	case ended:
		if r.dirty {
			c.publish(r)
		}
		if !r.counted && !r.refused {
			c.stats.uncounted.Add(1)
		}
		c.remove(r)
	}
}

// pendingOver looks at a flow that nothing answered yet.
func (c *Correlator) pendingOver(r *rec, now int64) {
	f := r.f
	switch {
	case f.Outcome == trace.Pending && now < r.tryBegan()+int64(c.cfg.UnansweredAfter):
		r.stateDue = r.tryBegan() + int64(c.cfg.UnansweredAfter)
	case f.Outcome == trace.Pending:
		f = c.edit(r)
		switch {
		case last(f).Retransmits > 0:
			c.unanswered(r, f)
		case r.picked && r.reply.IsZero():
			f.Outcome, f.Missing = trace.Unknown, missingEntry
		case c.losses.of(trace.NFLog, r.start, now):
			f.Outcome, f.Missing = trace.Unknown, missingAnswer
		case r.unreported():
			f.Outcome, f.Missing = trace.Unknown, missingReport
		default:
			c.unanswered(r, f)
		}
		c.publish(r)
		switch {
		case f.Outcome == trace.Unknown && c.ask(r):
			r.stateDue = now + askAgain
		case f.Outcome == trace.Unknown && c.cfg.Ask != nil:
			r.stateDue = now + askAgain
		case r.tcp() && f.Outcome == trace.Unanswered:
			r.stateDue = r.lastSyn + int64(c.cfg.GiveUpAfter)
		case c.cfg.Ask != nil:
			r.stateDue = r.lastSyn + udpExpiry
		}
	case r.tcp() && f.Outcome == trace.Unanswered:
		if due := r.lastSyn + int64(c.cfg.GiveUpAfter); due > now {
			r.stateDue = due
			return
		}
		f = c.edit(r)
		last(f).Outcome = tryTimeout
		c.end(r, trace.Timeout, trace.SynUnanswered, "")
	case c.ask(r):
		r.stateDue = now + max(askAgain, int64(c.cfg.GiveUpAfter))
	case c.cfg.Ask != nil:
		r.stateDue = now + askAgain
	}
}

// unreported reports whether no rule told of any packet of r, so that none need tell
// of its answer and end: the rules were not there, or are not to be.
func (r *rec) unreported() bool {
	return r.direct || !r.relayed && !r.untranslated && !r.picked && !r.f.Evidence.Has(trace.NFLog)
}

// tryBegan is when the attempt in use began.
func (r *rec) tryBegan() int64 { return max(r.start, r.tryStart) }

// succeed ends r because another connection has taken its tuple.
func (c *Correlator) succeed(r *rec, now int64) {
	switch {
	case r.replyWait && !r.superseded:
		// Its packets are still being kept.
		r.superseded, r.keptUntil = true, c.early.tail
	case r.phase == closing:
		c.finish(r)
	case r.destroyed:
		c.decideByDestroy(r, true)
	default:
		c.decideBlind(r, "the end: another connection took the tuple")
	}
}

// decideBlind ends r where all that is known is that its entry is gone.
func (c *Correlator) decideBlind(r *rec, missing string) {
	f := c.edit(r)
	switch {
	case !r.tcp() && r.answered:
		r.idleSince()
		c.end(r, trace.Closed, trace.NoReason, "")
	case r.answered:
		c.end(r, trace.Unknown, trace.NoReason, missing)
	case f.Outcome == trace.Unknown || r.tcp() && r.picked && r.reply.IsZero():
		c.end(r, trace.Unknown, trace.NoReason, or(f.Missing, missingEntry))
	case !r.tcp() && r.orig.Proto() != conntrack.UDP:
		c.end(r, trace.Closed, trace.NoReason, "")
	case c.losses.of(trace.NFLog, r.start, c.now) && last(f).Retransmits == 0:
		c.end(r, trace.Unknown, trace.NoReason, missingAnswer)
	default:
		last(f).Outcome = tryTimeout
		c.end(r, trace.Timeout, noAnswer(r), "")
	}
}

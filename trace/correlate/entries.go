package correlate

import (
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// translated reports whether an entry leads elsewhere than it was addressed,
// and counts those that do not: they are no business of a Service.
func (c *Correlator) translated(e *trace.Event) bool {
	if e.Reply.Src() != e.Tuple.Dst() {
		return true
	}
	c.stats.untranslated.Add(1)
	return false
}

// created takes a NEW: to the oldest pick that lacks one, or it waits for its
// pick.
func (c *Correlator) created(e *trace.Event) {
	if !c.translated(e) && !c.decider.serves(e.Tuple) {
		c.straight(e)
		return
	}
	newest := c.find(e.Tuple)
	if r := oldest(newest, func(r *rec) bool { return c.lacksEntry(r, e) }); r != nil {
		c.attach(r, e)
		return
	}
	if r := newest; r != nil && r.newSeen && r.newArrived == 0 && !r.destroyed && r.f.CTID == e.CTID {
		// A dump or an answer was quicker than the event.
		r.existing = r.existing && r.shown
		r.enter(e)
		if r.phase == ended && r.over() {
			c.remove(r)
		}
		return
	}
	r := c.add(e.Tuple, newest, e)
	c.hold(r, e)
}

// lacksEntry reports whether a NEW can be r's.
func (c *Correlator) lacksEntry(r *rec, e *trace.Event) bool {
	if !r.picked || r.newSeen || r.refused {
		return false
	}
	soon := e.Time-r.lastSyn <= int64(c.cfg.Hold)
	same := r.leadsTo(e.Reply)
	return soon && (same || r.phase < ended) || same && r.phase < ended
}

// hold makes a new record of an entry and has it wait for its pick.
func (c *Correlator) hold(r *rec, e *trace.Event) {
	r.phase = held
	r.enter(e)
	r.goneStatus = e.Status
	r.f.CTID, r.f.Reply = e.CTID, e.Reply
	c.setReply(r, e.Reply, true) // the packets may not have come that far
	r.holdDue = c.now + int64(c.cfg.Hold)
	c.arm(r)
}

// enter notes when an entry was made, where the kernel says so.
func (r *rec) enter(e *trace.Event) {
	r.newSeen = true
	switch {
	case e.Start != 0:
		r.newTime = e.Start
	case e.Kind == trace.KindNew && e.KernelTime:
		r.newTime = e.Time
	}
	if e.Kind == trace.KindNew {
		r.newArrived = e.Time
		// A SYN makes it SYN_SENT.
		r.resumed = r.resumed || r.tcp() && e.TCPState == conntrack.TCPEstablished
	}
}

// attach gives r the entry that it lacked.
func (c *Correlator) attach(r *rec, e *trace.Event) {
	f := c.edit(r)
	r.enter(e)
	f.Evidence = f.Evidence.With(e.Source)
	f.CTID, f.Reply = e.CTID, e.Reply
	if !r.relayed {
		f.Decision.SourceSeen = e.Reply.Dst()
	}
	if r.phase < ended {
		c.setReply(r, e.Reply, false)
	}
	if ep := e.Reply.Src(); ep != f.Backend.Addr && !r.relayed {
		c.rename(f, ep)
	}
	if r.replyWait {
		r.replyWait, r.holdDue = false, 0
	}
	r.settle()
	if r.phase == pending && f.Outcome == trace.Unknown && f.Missing == missingEntry {
		f.Missing = missingAnswer
	}
	c.release(r)
	if r.superseded && r.phase < ended && !r.destroyed && e.Kind != trace.KindDestroy {
		// Its DESTROY comes before the next NEW, if it is not lost.
		r.gone, r.holdDue = true, c.now+int64(c.cfg.Hold)
	}
	if r.phase != free && r.orig == e.Tuple {
		c.later(r)
		c.arm(r)
	}
}

// otherEntry reports whether a DESTROY is certainly not of the entry r has:
// NEW and DESTROY come in order, unless lost, so r's NEW comes first, also
// where an answer has told of the entry already. Different ids and times of
// making prove it too; equal ids prove nothing, for ids recur.
func (c *Correlator) otherEntry(r *rec, e *trace.Event) bool {
	switch {
	case r.newArrived == 0 && !r.existing:
		return !c.losses.of(trace.Conntrack, r.start, e.Time)
	case r.f.CTID != 0 && e.CTID != 0 && r.f.CTID != e.CTID:
		return true
	}
	return r.newTime != 0 && e.Start != 0 && r.newTime-e.Start > int64(time.Millisecond)
}

// count writes an entry's counters to an update, if the kernel kept any.
func count(f *trace.Flow, e *trace.Event) bool {
	if e.Out.Packets == 0 {
		return false
	}
	f.Out, f.In, f.Counted = e.Out, e.In, true
	return true
}

// destroyed takes a DESTROY, for the oldest generation whose NEW was seen.
func (c *Correlator) destroyed(e *trace.Event) {
	if !c.translated(e) && !c.isDirect(e) {
		return
	}
	newest := c.find(e.Tuple)
	r := oldest(newest, func(r *rec) bool {
		return r.oldEntries > 0 || r.newSeen && !r.destroyed && !r.refused && !c.otherEntry(r, e)
	})
	if r != nil && r.oldEntries > 0 {
		r.oldEntries-- // of an attempt before
		return
	}
	if r == nil {
		r = oldest(newest, func(r *rec) bool {
			return r.picked && !r.newSeen && r.leadsTo(e.Reply) &&
				c.losses.of(trace.Conntrack, r.start, e.Time)
		})
		if r == nil {
			c.stats.late.Add(1)
			return
		}
		c.attach(r, e)
		if r.phase == free || r.orig != e.Tuple {
			return
		}
	}
	r.destroyed = true
	r.goneStatus, r.goneState, r.goneEarly = e.Status, e.TCPState, e.Timeout > 0
	if n := r.newer; n != nil && n.resumed && !r.goneEarly && !n.expired {
		// The packet that made another entry was what found this one expired.
		if n.expired = true; n.f.Reason == trace.EntryLost {
			c.edit(n)
			c.publish(n)
		}
	}
	if e.Out.Packets > 0 && !(r.f.Counted && r.f.Out == e.Out && r.f.In == e.In) {
		count(c.edit(r), e)
	}
	r.counted = e.Out.Packets > 0
	if !r.f.Evidence.Has(e.Source) {
		f := c.edit(r)
		f.Evidence = f.Evidence.With(e.Source)
	}
	switch r.phase {
	case ended:
		c.publish(r)
		c.remove(r)
	case closing:
		if r.asked {
			c.finish(r)
		}
	case held:
	default:
		// The packets that tell more may be on their way.
		r.holdDue = c.now + int64(c.cfg.Hold)
		c.arm(r)
	}
}

// entry takes the answer to a question, or an entry of a dump.
func (c *Correlator) entry(e *trace.Event) {
	if !c.translated(e) && !c.isDirect(e) {
		return
	}
	newest := c.find(e.Tuple)
	r := newest
	for r != nil && r.phase == held {
		r = r.older
	}
	switch {
	case r == nil && newest != nil:
		return // its NEW was quicker
	case r == nil || r.refused:
		c.existing(e, newest)
		return
	case r.phase == ended:
		if !r.counted && tcpOver(e) && e.Out.Packets > 0 {
			r.counted = count(c.edit(r), e)
			c.publish(r)
			if r.over() {
				c.remove(r)
			}
		}
		return
	}
	if !r.newSeen {
		if c.attach(r, e); r.phase == free || r.orig != e.Tuple {
			return
		}
	}
	f := c.edit(r)
	f.Evidence = f.Evidence.With(e.Source)
	if !r.tcp() && r.phase == open && !r.relayed {
		c.stale(r, e)
	}
	counted := count(f, e)
	r.looked(e)
	switch r.phase {
	case closing:
		r.counted = counted
		r.halfClosed = !tcpOver(e)
		if r.asked {
			c.finish(r)
		}
		return
	case pending:
		if e.Status&conntrack.SeenReply != 0 {
			c.answeredNow(r, f, c.now)
			c.publish(r)
		} else if r.tcp() && f.Outcome == trace.Unknown {
			c.unanswered(r, f)
			c.publish(r)
		}
	}
	if r.unreported() && r.tcp() && tcpOver(e) && e.Status&conntrack.SeenReply != 0 {
		c.overByEntry(r, e)
		return
	}
	if !r.tcp() && c.cfg.Ask != nil {
		r.stateDue = c.now + int64(time.Second)*int64(e.Timeout+1)
		if due := r.askLeft(c.now); due != 0 {
			r.stateDue = due
		}
	}
	if f.Outcome.Failed() {
		c.publish(r)
	} else {
		c.later(r)
	}
	c.arm(r)
}

// tcpOver reports whether an entry's counters will not change any more.
func tcpOver(e *trace.Event) bool {
	return e.TCPState == conntrack.TCPTimeWait || e.TCPState == conntrack.TCPClose ||
		e.TCPState == conntrack.TCPLastAck
}

// existing makes a flow of an entry that nobody knew.
func (c *Correlator) existing(e *trace.Event, newest *rec) {
	if e.Tuple.Proto() == conntrack.TCP && tcpOver(e) {
		return
	}
	r := c.add(e.Tuple, newest, e)
	r.existing = e.Start != 0 && e.Start < c.started || e.Start == 0 && e.Time-c.started <= startDump
	c.hold(r, e)
}

// entryGone takes the answer that there is no such entry.
func (c *Correlator) entryGone(e *trace.Event) {
	r := c.find(e.Tuple)
	for r != nil && (r.phase == held || r.phase == ended) {
		r = r.older
	}
	switch {
	case r == nil:
	case r.phase == closing:
		c.finish(r)
	case r.phase == pending && r.tcp() && r.f.Outcome != trace.Unknown:
		// The next SYN makes a new one, or none comes.
	case r.phase == pending && r.f.Missing == missingEntry && c.stayed(r):
		// There never was one, so nothing can have answered.
		c.unanswered(r, c.edit(r))
		c.publish(r)
		c.arm(r)
	case !r.destroyed:
		r.gone = true
		r.holdDue = c.now + int64(c.cfg.Hold)
		c.arm(r)
	}
}

package correlate

import (
	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// pick starts a connection, or a further attempt of one.
func (c *Correlator) pick(e *trace.Event) {
	if e.Rule == nil {
		c.stats.foreign.Add(1)
		return
	}
	newest := c.find(e.Tuple)
	waiting := oldest(newest, func(r *rec) bool { return c.waitsForPick(r, e) })
	if live := latest(newest); live != nil && live != waiting && live.phase < ended {
		if live.picked && c.samePacket(live, e) {
			if live.answered || live.phase == closing {
				c.stats.late.Add(1)
				return
			}
			c.retry(live, waiting, e)
			return
		}
		c.succeed(live, e.Time)
	}
	r := waiting
	if r == nil {
		r = c.add(e.Tuple, c.find(e.Tuple), e)
	}
	c.decided(r, e)
}

// waitsForPick reports whether a pick can be r's.
func (c *Correlator) waitsForPick(r *rec, e *trace.Event) bool {
	if r.picked || r.refused || r.phase == ended {
		return false
	}
	if r.phase == held {
		return true
	}
	// Shown without a decision: a pick this late is still its own. The kernel
	// stamps the entry first on some versions, the packet first on others.
	return !r.existing && r.newArrived != 0 && e.Time <= r.newArrived+stampSlack
}

// samePacket reports whether a pick is about the connection r has: the same
// initial sequence number, or a datagram that raced another.
func (c *Correlator) samePacket(r *rec, e *trace.Event) bool {
	if r.tcp() {
		return r.isn == e.TCPSeq
	}
	return !r.destroyed && e.Time-r.lastSyn <= raceWindow
}

// decided fills r from its pick and shows it.
func (c *Correlator) decided(r *rec, e *trace.Event) {
	f := c.edit(r)
	r.picked, r.isn, r.device = true, e.TCPSeq, e.InDev
	r.resumed = r.resumed || r.tcp() && e.TCPFlags != 0 && e.TCPFlags&flagSYN == 0
	r.keptFrom = c.early.tail // nothing comes before the pick
	r.pickTime, r.pickExact, r.lastSyn = e.Time, e.KernelTime, e.Time
	r.startUnknown = false
	masqueraded := c.decide(r, e)
	r.elsewhere = scheduled(e) && rulesPick(f.Decision.Mode) && f.Decision.Note == notKept
	f.Evidence = f.Evidence.With(e.Source)
	if len(f.Attempts) == 0 {
		r.try(trace.Attempt{Outcome: tryPending, Latency: -1})
	}
	f.Attempts[0].Endpoint = f.Backend
	if r.answered {
		f.Attempts[0].Outcome = tryEstablished
	}
	r.holdDue = 0
	c.expectReply(r, masqueraded)
	r.settle()
	c.identify(r)
	if r.phase == held {
		c.begin(r, e.Time)
	}
	if r.destroyed {
		r.holdDue = c.now + int64(c.cfg.Hold)
	}
	if r.newSeen && !r.reply.IsZero() && r.reply.Src() != f.Backend.Addr {
		c.rename(f, r.reply.Src())
	}
	c.claim(r)
	c.publish(r)
	c.arm(r)
}

// begin moves a record that was held, or is new, to the phase it is in.
func (c *Correlator) begin(r *rec, now int64) {
	switch {
	case r.endAt != 0:
		r.phase = closing
		r.stateDue = now + settleWait
	case r.answered:
		r.phase = open
		r.f.Outcome = trace.Open
		r.stateDue = c.idleDue(r, now)
	case !r.tcp() && r.orig.Proto() != conntrack.UDP && !r.picked: // nothing reports its packets
		r.phase = open
		r.f.Outcome = trace.Open
	default:
		r.phase = pending
		r.stateDue = r.start + int64(c.cfg.UnansweredAfter)
	}
}

// expectReply sets what answers will look like: at once where the source is
// not translated, else when the entry is known.
func (c *Correlator) expectReply(r *rec, masqueraded bool) {
	switch {
	case r.newSeen:
		c.setReply(r, r.f.Reply, false)
		r.f.Decision.SourceSeen = r.f.Reply.Dst()
	case masqueraded:
		c.dropReply(r)
		r.f.Reply = conntrack.Tuple{}
		r.replyWait = true
		r.holdDue = c.now + int64(c.cfg.Hold)
	default:
		t := r.orig.WithDst(r.f.Backend.Addr).Reverse()
		c.setReply(r, t, true)
		r.f.Reply, r.f.Decision.SourceSeen = t, r.orig.Src()
	}
}

// retry adds an attempt: the entry was removed, and the client's next SYN was
// decided about anew. The new entry may be here already, as a record of its
// own. A datagram that raced another changes nothing unless its entry wins,
// which NEW tells.
func (c *Correlator) retry(r, waiting *rec, e *trace.Event) {
	if !r.tcp() && (r.newSeen || endpointOf(e) == r.f.Backend.Addr) {
		return
	}
	f := c.edit(r)
	if a := last(f); a.Outcome == tryPending {
		a.Outcome = tryUnanswered
	}
	r.lastSyn, r.lastEvent, r.tryStart = e.Time, e.Time, e.Time
	if r.newSeen && !r.destroyed {
		r.oldEntries++
	}
	r.inquired, r.settled, r.told = false, false, trace.NoReason
	// What ended was the attempt before.
	r.destroyed, r.gone, r.newSeen, r.counted, r.replyWait, r.holdDue = false, false, false, false, false, 0
	f.Counted, f.Out, f.In = false, conntrack.Counters{}, conntrack.Counters{}
	r.superseded, r.keptUntil = false, 0
	if waiting != nil {
		c.absorb(r, waiting)
	}
	masqueraded := c.decide(r, e)
	r.try(trace.Attempt{Endpoint: f.Backend, Start: when(e.Time), Outcome: tryPending, Latency: -1})
	c.expectReply(r, masqueraded)
	f.Outcome, f.Reason, f.Missing = trace.Pending, trace.NoReason, ""
	r.stateDue = e.Time + int64(c.cfg.UnansweredAfter)
	c.publish(r)
	c.arm(r)
}

// absorb gives r the entry of a held record of the same tuple.
func (c *Correlator) absorb(r, from *rec) {
	f, g := r.f, from.f
	f.CTID, f.Reply = g.CTID, g.Reply
	f.Counted, f.Out, f.In = g.Counted, g.Out, g.In
	f.Evidence |= g.Evidence
	r.newSeen, r.newArrived = true, from.newArrived
	r.destroyed, r.counted = from.destroyed, from.counted
	r.goneStatus, r.goneState, r.goneEarly = from.goneStatus, from.goneState, from.goneEarly
	if r.destroyed {
		r.holdDue = c.now + int64(c.cfg.Hold)
	}
	c.remove(from)
	c.setReply(r, f.Reply, false)
}

// refuse notes a packet that a rule of the proxy rejects or drops. A client
// that tries again with the same SYN is the same flow.
func (c *Correlator) refuse(e *trace.Event) {
	if e.Rule == nil {
		c.stats.foreign.Add(1)
		return
	}
	c.ipvs.take(e)
	newest := c.find(e.Tuple)
	for r := newest; r != nil; r = r.older {
		if r.refused && (!r.tcp() || r.isn == e.TCPSeq) && e.Time-r.lastSyn <= int64(c.cfg.GiveUpAfter) {
			r.lastSyn = e.Time
			r.stateDue = e.Time + int64(c.cfg.GiveUpAfter)
			c.arm(r)
			return
		}
	}
	if live := latest(newest); live != nil && live.phase < ended {
		if live.phase == pending && live.picked && live.tcp() && live.isn == e.TCPSeq {
			c.edit(live).Evidence = live.f.Evidence.With(e.Source)
			c.refusedBy(live, e)
			return
		}
		c.succeed(live, e.Time)
	}
	r := c.add(e.Tuple, c.find(e.Tuple), e)
	f := r.f
	r.isn, r.pickTime, r.lastSyn, r.pickExact = e.TCPSeq, e.Time, e.Time, e.KernelTime
	r.phase = pending
	c.decideRefusal(f, e)
	r.settle()
	c.identify(r)
	c.refusedBy(r, e)
}

func (c *Correlator) refusedBy(r *rec, e *trace.Event) {
	r.refused, r.lastSyn = true, e.Time
	o := trace.Rejected
	if e.Kind == trace.KindDrop {
		o = trace.Dropped
	}
	c.end(r, o, trace.Reason(e.Rule.Reason), "")
	r.stateDue = e.Time + int64(c.cfg.GiveUpAfter)
	c.arm(r)
}

// packet finds the flow of a packet and applies it, or keeps it for later.
func (c *Correlator) packet(e *trace.Event) {
	key := e.Tuple
	if e.Kind == trace.KindICMP {
		// About a request, or as its sender sees it about an answer.
		if key = key.Reverse(); c.keys[key] == nil && c.keys[e.Tuple] != nil {
			key = e.Tuple
		}
	}
	r := c.keys[key]
	if r == nil {
		c.keep(e, key)
		return
	}
	fromReply := key != r.orig
	for r.newer != nil {
		r = r.newer
	}
	newest := r
	if p := latest(r); p != nil {
		r = p
	} else if r.phase == held {
		c.keep(e, key) // another's, unless the pick was lost
		return
	}
	if fromReply {
		if r.replyWait && r.reply != key {
			c.keep(e, key)
			return
		}
		if r.reply != key {
			for r = newest; r != nil && r.reply != key; r = r.older {
			}
			if r == nil {
				c.keep(e, key)
				return
			}
		}
		if r.phase == closing && r.finIn {
			c.keep(e, key) // it said all it had to say: perhaps another's
			return
		}
	} else if r.replyWait {
		c.keep(e, key)
		return
	}
	c.apply(r, e, fromReply)
	if r.phase != free {
		c.arm(r)
	}
}

// apply applies a packet to its flow. fromReply says that it came from the
// endpoint, or for an ICMP error that it is about the request.
func (c *Correlator) apply(r *rec, e *trace.Event, fromReply bool) {
	if r.phase == ended {
		c.stats.late.Add(1)
		return
	}
	r.lastEvent = e.Time
	switch e.Kind {
	case trace.KindSyn:
		if !fromReply {
			c.retransmit(r, e)
		}
	case trace.KindSynAck, trace.KindReply:
		if fromReply {
			c.answer(r, e)
		}
	case trace.KindFin:
		c.fin(r, e, fromReply)
	case trace.KindRst:
		c.rst(r, e, fromReply)
	case trace.KindICMP:
		switch {
		case tooBig(e):
			c.tooBig(r, e)
		case fromReply && e.Tuple != r.reply:
			c.icmp(r, e)
		}
	}
	if r.phase != free {
		c.arm(r)
	}
}

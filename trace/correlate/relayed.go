package correlate

import (
	"slices"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// Connections that the userspace proxy relays. The proxy numbers them and tells
// all that happens, so nothing has to be guessed: events find their record by
// tuple and number. Connection tracking adds its entry, which leads from the
// address dialled to the proxy itself, and its counters.

// relayed takes an event of the userspace proxy.
func (c *Correlator) relayed(e *trace.Event) {
	r := c.relayedRec(e)
	switch {
	case e.Kind == trace.KindPick && e.Rule == nil:
		c.stats.foreign.Add(1)
		return
	case e.Kind == trace.KindPick && r == nil:
		c.accepted(e)
		return
	case e.Kind == trace.KindRelayEnd && r == nil && e.Relayed.End == proxy.EndedNoEndpoints && e.Rule != nil:
		refusal := *e
		refusal.Kind = trace.KindReject
		c.refuse(&refusal)
		return
	case r == nil || r.phase >= closing:
		c.stats.late.Add(1)
		return
	}
	r.lastEvent = e.Time
	f := c.edit(r)
	f.Evidence = f.Evidence.With(e.Source)
	switch e.Kind {
	case trace.KindPick:
		c.tryAnother(r, f, e)
	case trace.KindTryFailed:
		a := last(f)
		a.Outcome, a.Latency = failedTry(e), time.Duration(max(0, e.Time-r.tryBegan()))
		c.causeOfTry(r, f)
		relay(f)
		c.publish(r)
	case trace.KindConnected:
		r.answerAt = e.Time
		f.Decision.SourceSeen = e.Relayed.Upstream
		c.answeredNow(r, f, e.Time)
		relay(f)
		c.rememberLeg(r)
		c.publish(r)
	case trace.KindRelayEnd:
		c.relayOver(r, f, e)
	}
	if r.phase != free {
		c.arm(r)
	}
}

// relayedRec finds the record of an event's connection.
func (c *Correlator) relayedRec(e *trace.Event) *rec {
	for r := c.find(e.Tuple); r != nil; r = r.older {
		if r.relayed && r.isn == e.TCPSeq {
			return r
		}
	}
	return nil
}

// accepted starts a connection with its first pick. Its entry may be here
// already, waiting.
func (c *Correlator) accepted(e *trace.Event) {
	newest := c.find(e.Tuple)
	r := oldest(newest, func(r *rec) bool { return !r.picked && !r.refused && r.phase == held && r.f.Reply == e.Reply })
	if live := latest(newest); live != nil && live != r && live.phase < ended {
		c.succeed(live, e.Time)
	}
	if r == nil {
		r = c.add(e.Tuple, c.find(e.Tuple), e)
	}
	f := c.edit(r)
	r.picked, r.relayed, r.isn = true, true, e.TCPSeq
	r.keptFrom = c.early.tail
	r.pickTime, r.lastSyn, r.lastEvent = e.Time, e.Time, e.Time
	r.startUnknown = false
	c.decide(r, e)
	f.Evidence = f.Evidence.With(e.Source)
	r.try(trace.Attempt{Endpoint: f.Backend, Outcome: tryPending, Latency: -1})
	r.holdDue = 0
	f.Reply = e.Reply
	c.setReply(r, e.Reply, false)
	r.settle()
	c.identify(r)
	if r.phase == held {
		c.begin(r, e.Time)
	}
	c.publish(r)
	c.arm(r)
}

// tryAnother notes that another endpoint is dialled.
func (c *Correlator) tryAnother(r *rec, f *trace.Flow, e *trace.Event) {
	r.lastSyn, r.tryStart = e.Time, e.Time
	c.decide(r, e)
	r.try(trace.Attempt{Endpoint: f.Backend, Start: when(e.Time), Outcome: tryPending, Latency: -1})
	r.stateDue = e.Time + int64(c.cfg.UnansweredAfter)
	relay(f)
	c.publish(r)
}

// relayOver ends a connection as the proxy says.
func (c *Correlator) relayOver(r *rec, f *trace.Flow, e *trace.Event) {
	r.endAt = e.Time
	if r.answered {
		f.Out, f.In, f.Counted = conntrack.Counters{Bytes: e.Out.Bytes}, conntrack.Counters{Bytes: e.In.Bytes}, true
	}
	outcome, why := relayOutcome(r, f, e)
	f.Cause = ""
	switch {
	case why == trace.ResetByEndpoint:
		if reason, cause := c.stateOfEndpoint(f, f.Backend.Addr, r.tryBegan()); reason != trace.NoReason {
			why, f.Cause = reason, cause
		}
	case outcome == trace.Refused || outcome == trace.Timeout: // as the last try did
		if a := last(f); a.Reason != trace.NoReason {
			why, f.Cause = a.Reason, a.Cause
		}
	}
	relay(f)
	if r.tcp() && r.answered {
		// The entry has the counters that all modes show.
		c.close(r, outcome, why, e.Time+settleWait)
		return
	}
	if !r.tcp() {
		// Its entry outlives the session, and may serve the next one.
		r.destroyed = true
		r.endAt -= int64(e.Relayed.Age)
	}
	c.end(r, outcome, why, "")
}

// relayOutcome is what an end means for the flow.
func relayOutcome(r *rec, f *trace.Flow, e *trace.Event) (trace.Outcome, trace.Reason) {
	switch e.Relayed.End {
	case proxy.EndedResetClient:
		return trace.Reset, trace.ResetByClient
	case proxy.EndedResetEndpoint:
		return trace.Reset, trace.ResetByEndpoint
	case proxy.EndedNoEndpoints:
		return trace.Rejected, trace.NoEndpoints
	case proxy.EndedShutdown:
		if r.tcp() {
			return trace.Reset, trace.ProxyStopped
		}
	}
	if r.answered {
		return trace.Closed, trace.NoReason
	}
	a := last(f)
	switch a.Outcome {
	case tryRefused:
		return trace.Refused, trace.EndpointRefused
	case tryUnreachable:
		return trace.Refused, trace.Unreachable
	case tryPending:
		a.Outcome = tryTimeout
	}
	return trace.Timeout, noAnswer(r)
}

// causeOfTry says why the last try failed: as far as the state of its endpoint and
// the proxy's dial tell, and has whoever can look at the node's rules and routes.
func (c *Correlator) causeOfTry(r *rec, f *trace.Flow) {
	a := last(f)
	switch a.Outcome {
	case tryRefused:
		a.Reason = trace.EndpointRefused
	case tryUnreachable:
		a.Reason = trace.Unreachable
	default:
		a.Reason = noAnswer(r)
	}
	if reason, cause := c.stateOfEndpoint(f, a.Endpoint.Addr, r.tryBegan()); reason != trace.NoReason {
		a.Reason, a.Cause = reason, cause
		return
	}
	if c.cfg.Inquire != nil {
		r.inquired = true
		asked := *f // f is still being written
		asked.Attempts = slices.Clone(f.Attempts)
		c.cfg.Inquire(Inquiry{Flow: &asked, Try: len(f.Attempts)})
	}
}

// ExplainTry makes the reason of a failed try more exact, 1 being the first, for
// whoever Config.Inquire told of it.
func (c *Correlator) ExplainTry(id trace.FlowID, t conntrack.Tuple, try int, reason trace.Reason, cause string) {
	for r := c.find(t); r != nil; r = r.older {
		if r.f.ID != id {
			continue
		}
		if !r.relayed || try < 1 || try > len(r.f.Attempts) || r.f.Attempts[try-1].Reason == trace.NoReason {
			return
		}
		f := c.edit(r)
		a := &f.Attempts[try-1]
		was := a.Reason
		if reason != trace.NoReason {
			a.Reason = reason
		}
		a.Cause = cause
		if try == len(f.Attempts) && f.Outcome.Failed() && f.Reason == was {
			f.Reason, f.Cause = a.Reason, a.Cause
		}
		c.emit(r)
		return
	}
}

func failedTry(e *trace.Event) string {
	switch e.Relayed.Failure {
	case proxy.FailedRefused:
		return tryRefused
	case proxy.FailedUnreachable:
		return tryUnreachable
	}
	return tryTimeout
}

// leadsTo reports whether an entry with this reply tuple can be r's.
func (r *rec) leadsTo(reply conntrack.Tuple) bool {
	if r.relayed {
		return r.f.Reply == reply
	}
	return r.f.Backend.Addr == reply.Src()
}

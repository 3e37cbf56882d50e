package correlate

import (
	"sync/atomic"

	"github.com/kptrace/kptrace/trace"
)

// Stats counts a Correlator's work since it was made. The gauges are as of the
// last Advance.
type Stats struct {
	// Open is the number of flows not ended, Ended of those that wait for
	// their final counters, Held of packets that wait for a flow, Clients of
	// clients remembered for affinity.
	Open, Ended, Held, Clients int
	// Emitted counts updates, Flows the flows they belong to.
	Emitted, Flows uint64
	// Foreign counts packets and translated entries that belong to no
	// Service, Untranslated conntrack's events about connections that were
	// not translated, Late packets of flows already final or over their hold.
	Foreign, Untranslated, Late uint64
	// Evicted counts open flows and held ones that made room, Uncounted ended
	// flows that did so before their final counters came.
	Evicted, Uncounted uint64
	// Carried counts requests that named a span and found their flow,
	// CarriedLate those that did not.
	Carried, CarriedLate uint64
	// Asked counts questions about entries, Losses the spans reported.
	Asked, Losses uint64
	// Outcomes counts the flows that ended, by outcome.
	Outcomes map[trace.Outcome]uint64
}

var outcomes = [...]trace.Outcome{
	trace.Open, trace.Closed, trace.Refused, trace.Reset, trace.Unanswered,
	trace.Timeout, trace.Rejected, trace.Dropped, trace.Unknown, trace.Pending,
}

type counters struct {
	open, ended, held, clients atomic.Int64
	emitted, flows             atomic.Uint64
	foreign, untranslated      atomic.Uint64
	late, evicted, uncounted   atomic.Uint64
	asked, losses              atomic.Uint64
	carried, carriedLate       atomic.Uint64
	byOutcome                  [len(outcomes)]atomic.Uint64
}

func (s *counters) outcome(o trace.Outcome) {
	for i, name := range outcomes {
		if name == o {
			s.byOutcome[i].Add(1)
		}
	}
}

// Stats may be called at any time from any goroutine.
func (c *Correlator) Stats() Stats {
	n := &c.stats
	s := Stats{
		Carried: n.carried.Load(), CarriedLate: n.carriedLate.Load(),
		Open: int(n.open.Load()), Ended: int(n.ended.Load()),
		Held: int(n.held.Load()), Clients: int(n.clients.Load()),
		Emitted: n.emitted.Load(), Flows: n.flows.Load(),
		Foreign: n.foreign.Load(), Untranslated: n.untranslated.Load(), Late: n.late.Load(),
		Evicted: n.evicted.Load(), Uncounted: n.uncounted.Load(),
		Asked: n.asked.Load(), Losses: n.losses.Load(),
		Outcomes: make(map[trace.Outcome]uint64),
	}
	for i, o := range outcomes {
		if v := n.byOutcome[i].Load(); v > 0 {
			s.Outcomes[o] = v
		}
	}
	return s
}

func (c *Correlator) gauges() {
	c.stats.open.Store(int64(c.live.n))
	c.stats.ended.Store(int64(c.done.n))
	c.stats.held.Store(int64(c.early.live))
	c.stats.clients.Store(int64(len(c.affinity.entries)))
}

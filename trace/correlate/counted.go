package correlate

import (
	"fmt"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// Counted is what connection tracking counted in a span of time.
type Counted struct {
	// From and To are nanoseconds since 1970.
	From, To int64
	// Drop is how much conntrack.Stats' counter of this name grew in it.
	Drop uint64
	// Entries and Limit are as in conntrack.Stats, Entries the larger one of begin
	// and end.
	Entries, Limit uint64
}

const (
	// witnessWait is how long a first packet that came to the node has for its pick,
	// its refusal or its entry. It is longer than all sources take.
	witnessWait  = int64(time.Second)
	maxWitnesses = 2048
	// counterSlack is by how much the time at which counters are read is uncertain.
	counterSlack = int64(20 * time.Millisecond)
)

// witness is a first packet that came to the node.
type witness struct {
	at    int64
	seq   uint32
	full  bool // while the table was full and packets were dropped for it
	cause string
}

// Witnessed takes a first packet as it came to the node: a SYN, or a datagram. Of one
// that nothing else tells of, although it is for a Service, and that came while
// connection tracking dropped packets for want of room, it is said that it was one
// of those. at is nanoseconds since 1970, by the kernel's clock.
func (c *Correlator) Witnessed(t conntrack.Tuple, seq uint32, at int64) {
	if c.witnesses == nil {
		c.witnesses = make(map[conntrack.Tuple]*witness)
	}
	switch w := c.witnesses[t]; {
	case w != nil && w.seq == seq:
	case len(c.witnesses) >= maxWitnesses:
		c.stats.late.Add(1)
	default:
		c.witnesses[t] = &witness{at: at, seq: seq}
	}
}

// Counted tells witnesses what was counted when they came.
func (c *Correlator) Counted(x Counted) {
	if x.Drop == 0 || x.Limit == 0 || x.Entries < x.Limit-x.Limit/20 {
		return
	}
	for _, w := range c.witnesses {
		if w.at >= x.From-counterSlack && w.at <= x.To+counterSlack {
			w.full = true
			w.cause = fmt.Sprintf("%d of %d entries are in use; %d packets were dropped within %v", x.Entries, x.Limit, x.Drop,
				time.Duration(x.To-x.From).Round(10*time.Millisecond))
		}
	}
}

// heard forgets the witness of a packet that something else tells of.
func (c *Correlator) heard(t conntrack.Tuple) {
	if len(c.witnesses) > 0 {
		delete(c.witnesses, t)
	}
}

// unheard decides about witnesses whose time is over.
func (c *Correlator) unheard(now int64) {
	for t, w := range c.witnesses {
		if now-w.at < witnessWait {
			continue
		}
		delete(c.witnesses, t)
		if w.full && !c.losses.of(trace.NFLog, w.at, now) && !c.losses.of(trace.Conntrack, w.at, now) {
			c.noRoom(t, w)
		}
	}
}

// noRoom shows a connection whose first packet was dropped since the table was full.
func (c *Correlator) noRoom(t conntrack.Tuple, w *witness) {
	newest := c.find(t)
	for r := newest; r != nil; r = r.older {
		if r.refused && (!r.tcp() || r.isn == w.seq) && w.at-r.lastSyn <= int64(c.cfg.GiveUpAfter) {
			r.lastSyn = w.at
			r.stateDue = w.at + int64(c.cfg.GiveUpAfter)
			c.arm(r)
			return
		}
		if !r.refused && r.phase < ended {
			return // it is known after all
		}
	}
	walk, ok := c.decider.at(w.at, t, false, func(w *walked) bool { return w.effect == proxy.Forward })
	if !ok || !rulesPick(walk.decision.Mode) {
		return
	}
	e := trace.Event{Source: trace.Wire, Time: w.at, KernelTime: true, Tuple: t, TCPSeq: w.seq}
	r := c.add(t, newest, &e)
	f := r.f
	r.isn, r.pickTime, r.lastSyn, r.pickExact = w.seq, w.at, w.at, true
	r.phase, r.refused = pending, true
	f.Client = walk.client
	f.Client.Addr = t.Src()
	f.Service = trace.ServiceRef{Name: walk.service, Addr: t.Dst(), Via: walk.via}
	f.Decision = trace.Decision{Known: true, Mode: walk.decision.Mode, Policy: walk.decision.Policy, Excluded: walk.decision.Excluded,
		Affinity: trace.AffinityNone, Masquerade: "no"}
	f.Cause = w.cause
	r.settle()
	c.identify(r)
	c.end(r, trace.Dropped, trace.ConntrackFull, "")
	r.stateDue = c.now + int64(c.cfg.GiveUpAfter)
	c.arm(r)
}

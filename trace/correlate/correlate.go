package correlate

import (
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// Correlator joins events into flows. Its methods have one caller at a time,
// except Stats, which may be called from anywhere.
type Correlator struct {
	cfg Config
	// now is the latest time known, from events and Advance; started is the
	// first.
	now, started int64

	// keys finds a record by its original tuple, where it is the newest
	// generation, and by its reply tuple. live holds what is not ended, by
	// age, done what is, by the time it ended.
	keys       map[conntrack.Tuple]*rec
	live, done recList
	spare      *rec
	newest     *proxy.View // of endpointsLeft
	timers     wheel
	fired      []*rec
	early      earlyEvents
	carried    []carried
	misses     missRing
	affinity   affinityTable
	ipvs       ipvsState
	losses     lossList
	// witnesses are first packets by original tuple.
	witnesses map[conntrack.Tuple]*witness
	past      pasts
	decider   decider
	direct    directs
	sequence  uint64
	stats     counters
}

// New makes a Correlator. It starts nothing.
func New(cfg Config) *Correlator {
	cfg.setDefaults()
	c := &Correlator{cfg: cfg, keys: make(map[conntrack.Tuple]*rec)}
	c.affinity.init(cfg.MaxAffinity, cfg.RecentList)
	c.ipvs.init(cfg.MaxAffinity)
	c.decider.init(cfg.Node, cfg.Views)
	return c
}

// Handle takes one event. Events of one source come in that source's order.
// The Event may be used again afterwards.
func (c *Correlator) Handle(e *trace.Event) {
	c.begun(e.Time)
	c.now = max(c.now, e.Time)
	if e.Relayed != nil {
		c.relayed(e)
		return
	}
	switch e.Kind {
	case trace.KindPick, trace.KindReject, trace.KindDrop, trace.KindNew, trace.KindSyn:
		c.heard(e.Tuple)
	}
	switch e.Kind {
	case trace.KindMiss:
		c.misses.add(e)
	case trace.KindPick:
		if scheduled(e) {
			c.scheduled(e)
		} else {
			c.pick(e)
		}
	case trace.KindReject, trace.KindDrop:
		c.refuse(e)
	case trace.KindServer:
		c.ipvs.server(e)
	case trace.KindTemplate:
		c.ipvs.template(e)
	case trace.KindState:
		c.state(e)
	case trace.KindSyn, trace.KindSynAck, trace.KindFin, trace.KindRst, trace.KindICMP, trace.KindReply:
		if virtual(e) {
			c.addressed(e)
		} else {
			c.packet(e)
		}
	case trace.KindInvalid:
		c.invalidSegment(e)
	case trace.KindNew:
		c.created(e)
	case trace.KindDestroy:
		c.destroyed(e)
	case trace.KindEntry:
		c.entry(e)
	case trace.KindGone:
		c.entryGone(e)
	default:
		c.stats.foreign.Add(1)
	}
}

// Advance runs the timers up to now, which is a time up to which all events
// have been handed over: whoever was stopped for a while drains first. It
// costs as much as there is to do, whatever the number of flows.
func (c *Correlator) Advance(now time.Time) {
	t := now.UnixNano()
	c.begun(t)
	if t < c.now {
		// Events ahead of the clock came from the kernel's: run to here.
		t = max(t, c.now-int64(c.cfg.Hold))
	}
	c.now = max(c.now, t)
	c.endpointsLeft()
	c.fired = c.timers.expired(t, c.fired[:0])
	for i, r := range c.fired {
		c.fired[i] = nil
		if r.phase == free || r.wheeled || r.due == 0 || r.due > t {
			continue
		}
		c.fire(r, t)
	}
	c.unscheduled(t)
	c.expireEarly(t - 2*int64(c.cfg.Hold))
	c.expireCarried(t - 2*int64(c.cfg.Hold))
	c.forgetPasts(t)
	c.unheard(t)
	c.gauges()
}

// begun takes the first time there is for the start.
func (c *Correlator) begun(t int64) {
	if c.started == 0 {
		c.started = t
		c.timers.start(t)
	}
}

// fire runs what is due of r.
func (c *Correlator) fire(r *rec, now int64) {
	orig := r.orig
	alive := func() bool { return r.phase != free && r.orig == orig }
	if r.holdDue != 0 && r.holdDue <= now {
		r.holdDue = 0
		if c.holdOver(r); !alive() {
			return
		}
	}
	if r.stateDue != 0 && r.stateDue <= now {
		r.stateDue = 0
		if c.stateOver(r, now); !alive() {
			return
		}
	}
	if r.flushDue != 0 && r.flushDue <= now {
		c.emit(r)
	}
	c.arm(r)
}

// arm puts r on the wheel for the least of its deadlines.
func (c *Correlator) arm(r *rec) {
	due := r.holdDue
	for _, d := range [...]int64{r.stateDue, r.flushDue} {
		if d != 0 && (due == 0 || d < due) {
			due = d
		}
	}
	c.timers.set(r, due)
}

// Flows hands the flows that have not ended to f, oldest first, until it
// returns false. Updates held back so far are emitted first. f must not call
// back.
func (c *Correlator) Flows(f func(*trace.Flow) bool) {
	for r := c.live.first; r != nil; r = r.next {
		if !r.shown && r.phase == held {
			continue
		}
		if c.losses.overlap(r.start, c.now) && !r.f.Incomplete {
			c.edit(r)
		}
		c.emit(r)
		if !f(r.f) {
			return
		}
	}
}

// SeedAffinity tells of a client that the kernel's list of an endpoint holds,
// so that later picks can be told from first ones. Seed each list from its
// oldest entry to its newest.
func (c *Correlator) SeedAffinity(s AffinitySeed) {
	c.affinity.seed(s)
}

// SeededAffinity says that all lists there are were seeded: a client that is in
// none is new.
func (c *Correlator) SeededAffinity() { c.affinity.complete = true }

// Affinity returns what is known of clients, the one not seen for longest first, and
// whether of all: for a recording.
func (c *Correlator) Affinity() (clients []AffinityState, complete bool) {
	return c.affinity.state(), c.affinity.complete
}

// RestoreAffinity takes over what another Correlator knew when a recording began,
// before any event of it.
func (c *Correlator) RestoreAffinity(clients []AffinityState, complete bool) {
	c.affinity.restore(clients)
	c.affinity.complete = complete
}

// views returns the generations of intent, newest first.
func (c *Correlator) views() []*proxy.View { return c.decider.refresh() }

package correlate

import (
	"slices"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

const (
	// maxPaths bounds the paths kept of one flow.
	maxPaths = 64
	// pastKept is how long an ended flow waits for paths, and maxPast how many do.
	pastKept = int64(10 * time.Second)
	maxPast  = 65536
)

// past is a flow that has ended, for which a path may still come, or one whose
// other leg, that of the userspace proxy's own connection, has these tuples.
type past struct {
	orig, reply conntrack.Tuple
	leg         bool
	isn         uint32
	until       int64
	at          *place
}

// place is where a flow is: its record as long as there is one, its last update
// after that.
type place struct {
	r    *rec
	flow *trace.Flow
}

func (p *place) latest() *trace.Flow {
	if p.r != nil {
		return p.r.f
	}
	return p.flow
}

// pasts finds them by both tuples. It is empty unless Config.Paths says that
// paths come.
type pasts struct {
	by    map[conntrack.Tuple][]*past
	queue []*past
}

// remember keeps r, which has just ended.
func (c *Correlator) remember(r *rec) {
	if c.cfg.Paths == nil || !c.cfg.Paths() {
		return
	}
	c.awaits(r, &past{orig: r.orig, reply: r.f.Reply, isn: r.isn})
}

// rememberLeg keeps the tuples of the userspace proxy's own connection for r.
func (c *Correlator) rememberLeg(r *rec) {
	from, to := r.f.Decision.SourceSeen, r.f.Backend.Addr
	if c.cfg.Paths == nil || !c.cfg.Paths() || !from.IsValid() || !to.IsValid() {
		return
	}
	t := conntrack.NewTuple(r.orig.Proto(), from, to)
	c.awaits(r, &past{orig: t, reply: t.Reverse(), leg: true})
}

func (c *Correlator) awaits(r *rec, p *past) {
	if r.place == nil {
		r.place = &place{r: r}
	}
	p.at, p.until = r.place, c.now+pastKept
	if c.past.by == nil {
		c.past.by = make(map[conntrack.Tuple][]*past)
	}
	c.past.by[p.orig] = append(c.past.by[p.orig], p)
	if !p.reply.IsZero() && p.reply != p.orig {
		c.past.by[p.reply] = append(c.past.by[p.reply], p)
	}
	c.past.queue = append(c.past.queue, p)
	if len(c.past.queue) > maxPast {
		c.forgetFirst()
	}
}

// forgetPasts forgets those for which no path comes any more.
func (c *Correlator) forgetPasts(now int64) {
	for len(c.past.queue) > 0 && c.past.queue[0].until <= now {
		c.forgetFirst()
	}
}

func (c *Correlator) forgetFirst() {
	p := c.past.queue[0]
	c.past.queue[0] = nil
	c.past.queue = c.past.queue[1:]
	for _, t := range [...]conntrack.Tuple{p.orig, p.reply} {
		list := slices.DeleteFunc(c.past.by[t], func(o *past) bool { return o == p })
		if len(list) == 0 {
			delete(c.past.by, t)
		} else {
			c.past.by[t] = list
		}
	}
}

// Path gives the path of a packet to its flow, and reports whether there is one:
// the packet may come before what makes a flow of it.
func (c *Correlator) Path(p *trace.Path, packet *trace.PacketHeader) bool {
	if leg := c.pastOwner(packet, true); leg != nil {
		f := leg.at.latest()
		if p.Tuple == leg.orig && opening(f) == nil {
			return false // the client's own comes first
		}
		c.amend(leg.at, func(f *trace.Flow) { addLeg(f, p, p.Tuple == leg.orig) })
		return true
	}
	if r := c.owner(packet); r != nil {
		c.amend(&place{r: r}, func(f *trace.Flow) {
			addPath(f, p)
			c.ended(r, f, p)
		})
		return true
	}
	if gone := c.pastOwner(packet, false); gone != nil {
		c.amend(gone.at, func(f *trace.Flow) { addPath(f, p) })
		return true
	}
	return false
}

// ended notes what the path of a packet that is to open a connection shows of its end.
func (c *Correlator) ended(r *rec, f *trace.Flow, p *trace.Path) {
	if p.Tuple != r.orig || r.answered || r.relayed || p.Packet != "SYN" && r.tcp() {
		return
	}
	if r.fate = fateOf(p); r.fate != nil && f.Outcome.Failed() && unanswered(f.Reason) {
		f.Reason, f.Cause = r.fate.reason, r.fate.cause
	}
}

// amend changes a flow.
func (c *Correlator) amend(at *place, change func(*trace.Flow)) {
	if r := at.r; r != nil {
		change(c.edit(r))
		c.publish(r)
		c.arm(r)
		return
	}
	f := *at.flow
	f.Revision++
	f.Completed = false
	change(&f)
	at.flow = &f
	c.stats.emitted.Add(1)
	c.cfg.Emit(&f)
}

// addPath adds a path to an update being written.
func addPath(f *trace.Flow, p *trace.Path) {
	if len(f.Paths) >= maxPaths {
		return
	}
	done := *p
	done.Complete(f.Tuple, f.Reply)
	done.Number = len(f.Paths) + 1
	f.Paths = append(slices.Clip(f.Paths), done)
	for i := range done.Hops {
		f.Evidence = f.Evidence.With(done.Hops[i].Source)
	}
	relay(f)
}

// addLeg adds what the userspace proxy's own packet met: one to the endpoint to the
// path of the client's, an answer as a path of its own.
func addLeg(f *trace.Flow, p *trace.Path, out bool) {
	if !out {
		addPath(f, p)
		return
	}
	relay(f)
	opening(f).Leg(p)
	for i := range p.Hops {
		f.Evidence = f.Evidence.With(p.Hops[i].Source)
	}
}

// relay brings what the userspace proxy did up to date in the path of the packet
// that opened the connection.
func relay(f *trace.Flow) {
	if !f.Evidence.Has(trace.Userspace) || opening(f) == nil {
		return
	}
	f.Paths = slices.Clone(f.Paths)
	opening(f).Relay(f)
}

// opening is the path of a flow's first packet, nil if that is not known.
func opening(f *trace.Flow) *trace.Path {
	for i := range f.Paths {
		if !f.Paths[i].Reply {
			return &f.Paths[i]
		}
	}
	return nil
}

// owner finds the record of a packet: by its tuple, and among the connections
// that followed each other on that tuple by the initial sequence number. The
// userspace proxy does not know that: the newest is taken.
func (c *Correlator) owner(packet *trace.PacketHeader) *rec {
	r := c.keys[packet.Tuple]
	if r == nil {
		return nil
	}
	for r.newer != nil {
		r = r.newer
	}
	for ; r != nil; r = r.older {
		if (r.picked || r.refused || r.existing) && (r.orig == packet.Tuple || r.reply == packet.Tuple) &&
			(r.f.Evidence.Has(trace.Userspace) || begins(packet, r.isn, r.existing)) {
			return r
		}
	}
	return nil
}

// pastOwner finds the flow of a packet among those that have ended, or among those
// with another leg.
func (c *Correlator) pastOwner(packet *trace.PacketHeader, leg bool) *past {
	list := c.past.by[packet.Tuple]
	for i := len(list) - 1; i >= 0; i-- {
		p := list[i]
		if p.leg == leg && (leg || p.at.latest().Evidence.Has(trace.Userspace) || begins(packet, p.isn, false)) {
			return p
		}
	}
	return nil
}

// begins reports whether a packet can be of the connection with an initial
// sequence number; without one it is not one that begins a connection.
func begins(packet *trace.PacketHeader, isn uint32, unknown bool) bool {
	if packet.Tuple.Proto() != conntrack.TCP {
		return true
	}
	switch packet.Name() {
	case "SYN":
		return !unknown && packet.Seq == isn
	case "SYN-ACK":
		return !unknown && packet.Ack == isn+1
	}
	return true
}

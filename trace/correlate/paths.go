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

// past is a flow that has ended, for which a path may still come.
type past struct {
	orig, reply conntrack.Tuple
	isn         uint32
	until       int64
	// r is its record as long as there is one, flow its last update after that.
	r    *rec
	flow *trace.Flow
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
	p := &past{orig: r.orig, reply: r.f.Reply, isn: r.isn, until: c.now + pastKept, r: r}
	r.past = p
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
	if p.r != nil {
		p.r.past = nil
	}
}

// Path gives the path of a packet to its flow, and reports whether there is one:
// the packet may come before what makes a flow of it.
func (c *Correlator) Path(p *trace.Path, packet *trace.PacketHeader) bool {
	r := c.owner(packet)
	if r == nil {
		gone := c.pastOwner(packet)
		switch {
		case gone == nil:
			return false
		case gone.r == nil:
			f := *gone.flow
			f.Revision++
			f.Completed = false
			addPath(&f, p)
			gone.flow = &f
			c.stats.emitted.Add(1)
			c.cfg.Emit(&f)
			return true
		}
		r = gone.r
	}
	addPath(c.edit(r), p)
	c.publish(r)
	c.arm(r)
	return true
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
}

// owner finds the record of a packet: by its tuple, and among the connections
// that followed each other on that tuple by the initial sequence number.
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
			begins(packet, r.isn, r.existing) {
			return r
		}
	}
	return nil
}

// pastOwner finds the flow of a packet among those that have ended.
func (c *Correlator) pastOwner(packet *trace.PacketHeader) *past {
	list := c.past.by[packet.Tuple]
	for i := len(list) - 1; i >= 0; i-- {
		if begins(packet, list[i].isn, false) {
			return list[i]
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

package correlate

import (
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// directs counts connections straight to endpoints.
type directs struct {
	mu     sync.Mutex // guards counts
	counts map[trace.Target]trace.Direct
}

// Direct returns how many connections were made straight to each endpoint so far.
// It may be called from any goroutine.
func (c *Correlator) Direct() map[trace.Target]trace.Direct {
	c.direct.mu.Lock()
	defer c.direct.mu.Unlock()
	return maps.Clone(c.direct.counts)
}

// straight takes a NEW that nobody translated: if it leads to an endpoint, it is
// counted, and shown if somebody asks for that.
func (c *Correlator) straight(e *trace.Event) {
	t := trace.Target{Proto: e.Tuple.Proto(), Addr: e.Tuple.Dst()}
	v, ok := c.endpoint(t)
	if !ok {
		return
	}
	client := e.Tuple.Src().Addr()
	one := trace.Direct{Elsewhere: 1}
	switch {
	case c.decider.onNode(client) || c.cfg.Local(client):
		if v.Mode == proxy.Userspace {
			return // the proxy itself dials
		}
		one = trace.Direct{Node: 1}
	case c.decider.podHere(v, client):
		one = trace.Direct{Pods: 1}
	}
	c.direct.mu.Lock()
	if c.direct.counts == nil {
		c.direct.counts = make(map[trace.Target]trace.Direct)
	}
	c.direct.counts[t] = c.direct.counts[t].Add(one)
	c.direct.mu.Unlock()
	if !c.cfg.Direct() {
		return
	}
	r := c.add(e.Tuple, c.find(e.Tuple), e)
	r.direct = true
	c.hold(r, e)
}

// isDirect reports whether an entry that nobody translated is of a record.
func (c *Correlator) isDirect(e *trace.Event) bool {
	for r := c.find(e.Tuple); r != nil; r = r.older {
		if r.direct {
			return true
		}
	}
	return false
}

// nameDirect writes to a held record's update whose endpoint it is.
func (c *Correlator) nameDirect(r *rec) {
	f := r.f
	f.Client, f.Backend = trace.Peer{Addr: r.orig.Src()}, trace.Peer{Addr: r.orig.Dst()}
	f.Service = trace.ServiceRef{Addr: r.orig.Dst(), Via: proxy.ViaDirect}
	f.Decision = trace.Decision{Affinity: trace.AffinityNone, Note: "the endpoint's own address was dialled"}
	v, ok := c.endpoint(trace.Target{Proto: r.orig.Proto(), Addr: r.orig.Dst()})
	if !ok {
		return // it left while its entry was held
	}
	f.Service.Name = c.decider.endpoints.first[trace.Target{Proto: r.orig.Proto(), Addr: r.orig.Dst()}]
	f.Decision.Mode = v.Mode
	f.Client = c.decider.peer(v, r.orig.Src().Addr(), c.decider.onNode(r.orig.Src().Addr()))
	f.Client.Addr = r.orig.Src()
	f.Backend = c.decider.backend(v, f.Service.Name, r.orig.Dst())
}

// endpoint reports whether the newest generation has an endpoint. When its endpoints
// are others than before, the counts of those that are gone go.
func (c *Correlator) endpoint(t trace.Target) (*proxy.View, bool) {
	d := &c.decider
	views := d.refresh()
	if len(views) == 0 || views[0].Snapshot == nil {
		return nil, false
	}
	if d.endpoints.follow(views[0].Snapshot) {
		c.direct.mu.Lock()
		maps.DeleteFunc(c.direct.counts, func(t trace.Target, _ trace.Direct) bool { _, ok := d.endpoints.first[t]; return !ok })
		c.direct.mu.Unlock()
	}
	_, ok := d.endpoints.first[t]
	return views[0], ok
}

// podHere reports whether an address is that of a pod on this node.
func (d *decider) podHere(v *proxy.View, a netip.Addr) bool {
	if p, ok := v.Snapshot.Pods[a]; ok && p.Node != "" {
		return p.Node == d.node
	}
	return slices.ContainsFunc(v.Snapshot.Node.PodCIDRs, func(r netip.Prefix) bool { return r.Contains(a) })
}

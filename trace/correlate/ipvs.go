package correlate

import (
	"net/netip"
	"slices"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// In the IPVS mode, and beside another kube-proxy, a first packet is reported
// twice, to the Service's address and to the endpoint that was picked. Here the
// two become one: a pick with the client's own tuple, or a SYN sent again. See
// proxy.IDVirtual.

const (
	// sampleKept is how old a sample may be to explain a pick.
	sampleKept = int64(10 * time.Second)
	// sampleSlack is how far apart the servers of one sample may be in time.
	sampleSlack = int64(time.Second)
	maxVirtual  = 8192
	// pickWait is how long the pick may come after the packet.
	pickWait = int64(time.Second)
	// roundedSecond is by how much the age of a template may be wrong.
	roundedSecond = int64(1100 * time.Millisecond)
)

const noServer = "IPVS picked no server"

// ipvsState is what is known of IPVS beside the flows.
type ipvsState struct {
	// waiting holds the packets to virtual servers that no pick has followed
	// yet, by client; order has their keys by age.
	waiting map[conntrack.Tuple]addressed
	order   []conntrack.Tuple

	servers   map[conntrack.Tuple]map[netip.AddrPort]serverSample // by virtual server
	templates map[conntrack.Tuple]template                        // client with port 0 -> virtual server
	max       int
}

// addressed is a packet to a virtual server. It is due some time after the first
// Advance that found it waiting, not after its own time: while a reader stands
// still, its pick waits too.
type addressed struct {
	trace.Event
	due int64
}

type serverSample struct {
	trace.IPVSSample
	time int64
}

type template struct {
	endpoint    netip.AddrPort
	time, until int64
}

func (s *ipvsState) init(most int) {
	s.waiting = make(map[conntrack.Tuple]addressed)
	s.servers = make(map[conntrack.Tuple]map[netip.AddrPort]serverSample)
	s.templates = make(map[conntrack.Tuple]template)
	s.max = most
}

// virtual reports whether e is a packet on its way to a virtual server.
func virtual(e *trace.Event) bool {
	return e.Kind == trace.KindSyn && e.Rule != nil && e.Rule.Tag.ID == proxy.IDVirtual
}

// scheduled reports whether e is a packet that IPVS, or another kube-proxy's
// rules, have picked a server for.
func scheduled(e *trace.Event) bool {
	return e.Kind == trace.KindPick && e.Rule != nil && (e.Rule.Tag.ID == proxy.IDScheduled || e.Rule.Tag.ID == proxy.IDTranslated)
}

// endpointOf returns the endpoint of a pick: its rule's, or where one rule
// serves all, where answers will come from.
func endpointOf(e *trace.Event) netip.AddrPort {
	if e.Rule.Endpoint.IsValid() {
		return e.Rule.Endpoint
	}
	return e.Reply.Src()
}

// clientOf is the key of what waits: one client socket.
func clientOf(t conntrack.Tuple) conntrack.Tuple {
	src := t.Src()
	return conntrack.NewTuple(t.Proto(), src, src)
}

// addressed notes a packet to a virtual server until the pick comes, which is
// the next thing its group reports of it.
func (c *Correlator) addressed(e *trace.Event) {
	s := &c.ipvs
	k := clientOf(e.Tuple)
	if old, ok := s.waiting[k]; ok {
		delete(s.waiting, k)
		c.notScheduled(&old.Event)
	} else if len(s.order) >= maxVirtual {
		first := s.order[0]
		if v, ok := s.waiting[first]; ok {
			delete(s.waiting, first)
			c.notScheduled(&v.Event)
		}
		s.order = append(s.order[:0], s.order[1:]...)
	}
	s.waiting[k] = addressed{Event: *e}
	s.order = append(s.order, k)
}

// take returns and forgets the packet to a virtual server that e continues.
func (s *ipvsState) take(e *trace.Event) (trace.Event, bool) {
	k := clientOf(e.Tuple)
	v, ok := s.waiting[k]
	if !ok || e.Tuple.Proto() == conntrack.TCP && v.TCPSeq != e.TCPSeq {
		return trace.Event{}, false
	}
	delete(s.waiting, k)
	return v.Event, true
}

// scheduled takes a packet that IPVS has picked a server for.
func (c *Correlator) scheduled(e *trace.Event) {
	pick, ok := c.ipvs.take(e)
	if !ok {
		// Its first report was lost: the entry knows where it was sent.
		r := c.keys[e.Tuple.Reverse()]
		if r == nil || r.reply != e.Tuple.Reverse() {
			c.stats.foreign.Add(1)
			return
		}
		pick = *e
		pick.Tuple = r.orig
	}
	syn := pick
	pick.Kind, pick.Rule, pick.Mark, pick.Reply = trace.KindPick, e.Rule, e.Mark, e.Tuple.Reverse()
	live := latest(c.find(pick.Tuple))
	if live == nil || live.phase >= ended || !live.picked || live.gone || live.destroyed ||
		live.f.Backend.Addr != e.Tuple.Dst() || live.tcp() && live.isn != e.TCPSeq {
		c.pick(&pick)
		return
	}
	// The same server again: the kernel reports each packet until an answer.
	if live.tcp() && live.phase == pending {
		syn.Kind = trace.KindSyn
		c.packet(&syn)
	}
}

// unscheduled decides about packets that no pick has followed for long enough.
func (c *Correlator) unscheduled(now int64) {
	s := &c.ipvs
	n, waiting := 0, false
	for i, k := range s.order {
		v, ok := s.waiting[k]
		switch {
		case !ok:
		case v.due == 0:
			v.due, waiting = now+pickWait, true
			s.waiting[k] = v
		case v.due > now:
			waiting = true
		default:
			delete(s.waiting, k)
			c.notScheduled(&v.Event)
		}
		if !waiting {
			n = i + 1
		}
	}
	if n == len(s.order) {
		s.order = s.order[:0]
	} else if n > 0 {
		s.order = append(s.order[:0], s.order[n:]...)
	}
}

// notScheduled takes a packet to a virtual server that was not sent on: a SYN
// sent again that IPVS drops, as it does once after it has given up a server,
// or a first one for which there is none.
func (c *Correlator) notScheduled(e *trace.Event) {
	if live := latest(c.find(e.Tuple)); live != nil && live.phase < ended && (!live.tcp() || live.isn == e.TCPSeq) {
		if live.tcp() && live.phase == pending {
			c.packet(e)
		}
		return
	}
	if c.find(e.Tuple) != nil || c.losses.of(trace.NFLog, e.Time, c.now) {
		c.stats.late.Add(1)
		return
	}
	w, _ := c.decider.at(e.Time, e.Tuple, e.Hook == hookOutput, func(w *walked) bool { return w.effect != proxy.Pass })
	if w == nil || w.effect == proxy.Pass {
		c.stats.foreign.Add(1)
		return
	}
	refused := *e
	refused.Kind = trace.KindReject
	refused.Rule = &proxy.Rule{Tag: e.Rule.Tag, Service: w.service, Reason: string(trace.NoEndpoints)}
	note, lost := "", false
	switch {
	case w.effect != proxy.Forward && c.refuses(w, e.Tuple.Dst().Addr().Is6()): // no rule that refuses reports it
		refused.Rule.Reason = w.reason
		if w.effect == proxy.Drop {
			refused.Kind = trace.KindDrop
		}
	case w.effect == proxy.Reject: // as the rules were when they were read last
		refused.Rule.Reason, lost = string(trace.DroppedOnNode), true
	case w.decision.Mode == proxy.IPVS && c.ipvs.idle(e):
		note = noServer
	default: // rules that lead to endpoints, and it did not come to any
		refused.Kind, refused.Rule.Reason, lost = trace.KindDrop, string(trace.DroppedOnNode), true
		note = "which endpoint was picked is not known"
	}
	c.refuse(&refused)
	if r := latestRefused(c.find(e.Tuple)); r != nil && (note != "" || lost) {
		f := c.edit(r)
		f.Service.Name, f.Service.Via, f.Decision.Mode, f.Decision.Note = w.service, w.via, w.decision.Mode, note
		c.publish(r)
		if r.device = e.InDev; lost {
			c.inquire(r)
		}
	}
}

// refuses reports whether the state agrees with live rules that refuse a Service,
// which may have changed since they were read.
func (c *Correlator) refuses(w *walked, six bool) bool {
	if !rulesPick(w.view.Mode) || w.view.Snapshot == nil {
		return true // they are made of the state
	}
	s := c.decider.service(w.view, w.service, six)
	if s == nil {
		return false
	}
	usable := slices.ContainsFunc(s.Endpoints, func(e proxy.Endpoint) bool { return e.Ready || e.Serving })
	switch trace.Reason(w.reason) {
	case trace.NoEndpoints:
		return !usable
	case trace.NoLocalEndpoints:
		return usable && (s.InternalLocal || s.ExternalLocal)
	case trace.SourceRange:
		return len(s.SourceRanges) > 0
	}
	return false
}

func latestRefused(r *rec) *rec {
	for ; r != nil && !r.refused; r = r.older {
	}
	return r
}

// judgePersistence sets the affinity word of a pick by IPVS or by another
// kube-proxy's rules. Nothing reports whether a template or a list decided, so it
// is told from the templates last seen and
// from the client's earlier picks.
func (c *Correlator) judgePersistence(r *rec, e *trace.Event, w *walked) {
	d := &r.f.Decision
	if d.AffinityTimeout == 0 || w == nil {
		return
	}
	endpoint, client := endpointOf(e), e.Tuple.Src().Addr()
	k := affinityKey{client.As16(), w.handle}
	timeout := int64(d.AffinityTimeout)
	if t, ok := c.ipvs.templates[templateKey(e.Tuple)]; ok && t.until > e.Time {
		// A template is as old as what is left of it is short.
		// One as young as this connection was made by it.
		last := t.until - timeout
		if old := c.affinity.entries[k]; (old == nil || old.last < last) && last+roundedSecond <= e.Time {
			c.affinity.touch(k, t.endpoint, last)
		}
	}
	old := c.affinity.entries[k]
	if old.counted(e.Time) {
		d.Affinity, d.Note = "", countedNote
		return
	}
	missed := old == nil || old.endpoint != endpoint || e.Time-old.last >= timeout+affinitySlack
	d.Affinity, d.AffinityAge = c.affinity.judge(k, e.Time, d.AffinityTimeout, missed,
		func(ep netip.AddrPort) bool { return w.find(ep) != nil })
	if d.Affinity == trace.AffinityEvicted && d.Mode != proxy.IPTables {
		d.Affinity = trace.AffinityReset // others keep any number of clients
	}
	switch {
	case old == nil && d.Mode != proxy.IPVS && !c.affinity.complete && e.Time-c.started < timeout:
		d.Affinity, d.Note = "", "affinity unknown: the client may have been here before kptrace"
	case old.doubtful(e.Time, d.AffinityTimeout) && old.endpoint == endpoint:
		d.Affinity, d.AffinityAge, d.Note = "", 0, "affinity unknown: the client's entry was as old as the timeout, within the clocks' difference"
	}
	c.moved(r, old, endpoint)
	c.affinity.touch(k, endpoint, e.Time)
}

// state notes what IPVS makes of a connection. Most samples say nothing new.
func (c *Correlator) state(e *trace.Event) {
	r := latest(c.find(e.Tuple))
	if r == nil || r.phase >= ended || r.f.IPVSState == e.IPVS.State || r.f.Backend.Addr != e.Reply.Src() {
		return
	}
	f := c.edit(r)
	f.IPVSState, f.Evidence = e.IPVS.State, f.Evidence.With(e.Source)
	c.later(r)
	c.arm(r)
}

func templateKey(t conntrack.Tuple) conntrack.Tuple {
	return conntrack.NewTuple(t.Proto(), netip.AddrPortFrom(t.Src().Addr(), 0), t.Dst())
}

// template notes a sample of a persistence template.
func (s *ipvsState) template(e *trace.Event) {
	k := templateKey(e.Tuple)
	if _, ok := s.templates[k]; !ok && len(s.templates) >= s.max {
		for old, t := range s.templates {
			if t.until <= e.Time {
				delete(s.templates, old)
			}
		}
		if len(s.templates) >= s.max {
			return // hits are then told from earlier picks alone
		}
	}
	s.templates[k] = template{e.Reply.Src(), e.Time, e.Time + int64(e.IPVS.Left)*int64(time.Second)}
}

// server notes a sample of a server.
func (s *ipvsState) server(e *trace.Event) {
	k := virtualKey(e.Tuple.Proto(), e.Tuple.Dst())
	m := s.servers[k]
	if m == nil {
		if len(s.servers) >= s.max {
			return
		}
		m = make(map[netip.AddrPort]serverSample)
		s.servers[k] = m
	}
	m[e.Tuple.Src()] = serverSample{e.IPVS, e.Time}
	for a, x := range m {
		if e.Time-x.time > sampleKept {
			delete(m, a) // it has gone
		}
	}
}

// idle reports whether all servers that IPVS had for a packet had weight 0 when they
// were sampled last, not long ago: then it picks none, and refuses. Without such a
// sample the packet may have been dropped before IPVS, or behind it.
func (s *ipvsState) idle(e *trace.Event) bool {
	known := false
	for _, x := range s.servers[virtualKey(e.Tuple.Proto(), e.Tuple.Dst())] {
		if e.Time-x.time > sampleKept {
			continue
		}
		if known = true; x.Weight > 0 {
			return false
		}
	}
	return known
}

func virtualKey(proto conntrack.Proto, a netip.AddrPort) conntrack.Tuple {
	return conntrack.NewTuple(proto, a, a)
}

// looksAtLoad reports whether a scheduler's choice depends on connections.
func looksAtLoad(scheduler string) bool {
	switch scheduler {
	case "lc", "wlc", "sed", "nq", "lblc", "lblcr", "ovf":
		return true
	}
	return false
}

// inputs writes to f how the server gets its packets, and what the scheduler
// had to choose from.
func (s *ipvsState) inputs(f *trace.Flow, e *trace.Event) {
	d := &f.Decision
	m := s.servers[virtualKey(e.Tuple.Proto(), e.Tuple.Dst())]
	d.Load, d.Forwarding = nil, m[endpointOf(e)].Method
	if !looksAtLoad(d.Algorithm) || d.Affinity == trace.AffinityHit {
		return
	}
	newest := int64(0)
	for _, x := range m {
		newest = max(newest, x.time)
	}
	if newest == 0 || e.Time-newest > sampleKept {
		return
	}
	load := &trace.Load{Age: time.Duration(max(0, e.Time-newest)), Picked: -1}
	for a, x := range m {
		if newest-x.time <= sampleSlack {
			load.Servers = append(load.Servers, trace.ServerLoad{
				Addr: a, Active: int(x.Active), Inactive: int(x.Inactive), Weight: int(x.Weight),
			})
		}
	}
	slices.SortFunc(load.Servers, func(a, b trace.ServerLoad) int { return a.Addr.Compare(b.Addr) })
	for i := range load.Servers {
		if load.Servers[i].Addr == endpointOf(e) {
			load.Picked = i
		}
	}
	d.Load = load
}

package correlate

import (
	"net/netip"
	"slices"
	"unique"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// decider answers what the rules say about a packet, from the generations of
// intent. Walks are remembered per destination, client address and generation,
// until there is a newer one.
type decider struct {
	node    string
	source  func() []*proxy.View
	current []*proxy.View
	walks   map[walkKey]*walked
	// verdicts holds what walks have in common, so that a walk remembered
	// costs little however many endpoints a Service has.
	verdicts map[verdictKey][]*verdict
	services map[serviceKey]*proxy.Service
	// clusterIPs are those of Services with endpoints in the generation of.
	clusterIPs map[clusterIP]struct{}
	of         *proxy.View
	endpoints  endpointIndex
}

type clusterIP struct {
	addr  netip.AddrPort
	proto conntrack.Proto
}

type walkKey struct {
	// tuple has no source port: no rule looks at it.
	tuple    conntrack.Tuple
	view     *proxy.View
	fromNode bool
}

type walked struct {
	*verdict
	client trace.Peer
}

type verdictKey struct {
	view    *proxy.View
	service proxy.PortName
	via     proxy.Via
}

type serviceKey struct {
	view *proxy.View
	name proxy.PortName
	is6  bool
}

// verdict is an Outcome as far as flows need it.
type verdict struct {
	view    *proxy.View
	effect  proxy.Verdict
	service proxy.PortName
	handle  unique.Handle[proxy.PortName]
	via     proxy.Via
	// decision is what every pick has in common.
	decision trace.Decision
	choices  []choice
	// reason is why it is refused.
	reason string
	// index finds a choice where there are many.
	index map[netip.AddrPort]int
}

type choice struct {
	peer        trace.Peer
	probability float64
	masquerade  string
}

func (d *decider) init(node string, views func() []*proxy.View) {
	d.node, d.source = node, views
	d.walks = make(map[walkKey]*walked)
	d.verdicts = make(map[verdictKey][]*verdict)
	d.services = make(map[serviceKey]*proxy.Service)
}

// refresh returns the views, newest first, and forgets walks when there is a
// new one.
func (d *decider) refresh() []*proxy.View {
	views := d.source()
	if len(views) > 0 && (len(d.current) == 0 || d.current[0] != views[0]) || len(d.walks) >= maxWalks {
		clear(d.walks)
		clear(d.verdicts)
		clear(d.services)
	}
	d.current = views
	return views
}

// walk returns what a view's rules say about a packet.
func (d *decider) walk(v *proxy.View, t conntrack.Tuple, fromNode bool) *walked {
	src, dst := t.Src(), t.Dst()
	key := walkKey{conntrack.NewTuple(t.Proto(), netip.AddrPortFrom(src.Addr(), 0), dst), v, fromNode}
	if w := d.walks[key]; w != nil {
		return w
	}
	var o proxy.Outcome
	if v.Program != nil {
		o = v.Program.Walk(proxy.Packet{Proto: t.Proto(), Src: src, Dst: dst, FromNode: fromNode})
	}
	w := &walked{verdict: d.intern(v, &o), client: d.peer(v, src.Addr(), fromNode)}
	d.walks[key] = w
	return w
}

// intern returns the verdict for an outcome, the same for equal ones.
func (d *decider) intern(view *proxy.View, o *proxy.Outcome) *verdict {
	key := verdictKey{view, o.Service, o.Via}
	for _, v := range d.verdicts[key] {
		if v.equal(o) {
			return v
		}
	}
	v := &verdict{
		view: view, effect: o.Verdict, service: o.Service, via: o.Via, reason: o.Reason,
		handle: unique.Make(o.Service),
		decision: trace.Decision{
			Known: true, Mode: view.Mode, Algorithm: o.Algorithm, Candidates: len(o.Choices),
			Policy: o.Policy, Excluded: o.Excluded,
			Affinity: trace.AffinityNone, AffinityTimeout: o.Affinity,
		},
		choices: make([]choice, len(o.Choices)),
	}
	if len(o.Choices) > 16 {
		v.index = make(map[netip.AddrPort]int, len(o.Choices))
	}
	for i := range o.Choices {
		x := &o.Choices[i]
		v.choices[i] = choice{d.backend(view, o.Service, x.Endpoint), x.Probability, x.Masquerade}
		if v.index != nil {
			v.index[x.Endpoint] = i
		}
	}
	d.verdicts[key] = append(d.verdicts[key], v)
	return v
}

func (v *verdict) equal(o *proxy.Outcome) bool {
	x := &v.decision
	return v.effect == o.Verdict && v.reason == o.Reason && x.Algorithm == o.Algorithm && x.Policy == o.Policy &&
		x.Excluded == o.Excluded && x.AffinityTimeout == o.Affinity &&
		slices.EqualFunc(v.choices, o.Choices, func(a choice, b proxy.Choice) bool {
			return a.peer.Addr == b.Endpoint && a.probability == b.Probability && a.masquerade == b.Masquerade
		})
}

// find returns the choice for an endpoint, nil if it is none.
func (v *verdict) find(endpoint netip.AddrPort) *choice {
	if v.index != nil {
		if i, ok := v.index[endpoint]; ok {
			return &v.choices[i]
		}
		return nil
	}
	for i := range v.choices {
		if v.choices[i].peer.Addr == endpoint {
			return &v.choices[i]
		}
	}
	return nil
}

// at returns the walk of the view in force at a time that satisfies ok: the
// newest one that had begun, else older ones, else newer ones. Without any it
// returns the walk of the one in force, or nil where there are no views.
func (d *decider) at(time int64, t conntrack.Tuple, fromNode bool, ok func(*walked) bool) (w *walked, found bool) {
	views := d.refresh()
	if len(views) == 0 {
		return nil, false
	}
	force := 0
	for force < len(views)-1 && views[force].From.UnixNano() > time {
		force++
	}
	for i := force; i < len(views); i++ {
		if w := d.walk(views[i], t, fromNode); ok(w) {
			return w, true
		}
	}
	for i := force - 1; i >= 0; i-- {
		if w := d.walk(views[i], t, fromNode); ok(w) {
			return w, true
		}
	}
	return d.walk(views[force], t, fromNode), false
}

// peer names an address.
func (d *decider) peer(v *proxy.View, a netip.Addr, onNode bool) trace.Peer {
	var p trace.Peer
	if s := v.Snapshot; s != nil {
		if pod, ok := s.Pods[a]; ok {
			p.Namespace, p.Pod, p.Node, p.Workload = pod.Namespace, pod.Name, pod.Node, pod.Workload
			return p
		}
		p.Node = s.Nodes[a]
	}
	if p.Node == "" && (onNode || a.IsLoopback()) {
		p.Node = d.node
	}
	return p
}

// backend names an endpoint of a Service.
func (d *decider) backend(v *proxy.View, service proxy.PortName, endpoint netip.AddrPort) trace.Peer {
	p := d.peer(v, endpoint.Addr(), false)
	p.Addr = endpoint
	if s := d.service(v, service, endpoint.Addr().Is6()); s != nil {
		for i := range s.Endpoints {
			e := &s.Endpoints[i]
			if e.Addr != endpoint {
				continue
			}
			if e.Pod != "" {
				p.Namespace, p.Pod = e.Namespace, e.Pod
			}
			if e.Node != "" {
				p.Node = e.Node
			}
			p.Zone = e.Zone
			break
		}
	}
	return p
}

func (d *decider) service(v *proxy.View, name proxy.PortName, is6 bool) *proxy.Service {
	key := serviceKey{v, name, is6}
	s, ok := d.services[key]
	if ok || v.Snapshot == nil {
		return s
	}
	for i := range v.Snapshot.Services {
		if x := &v.Snapshot.Services[i]; x.Name == name && x.Is6() == is6 {
			s = x
			break
		}
	}
	d.services[key] = s
	return s
}

// owner finds the Service that an address belongs to by the state alone.
func (d *decider) owner(v *proxy.View, t conntrack.Tuple) (name proxy.PortName, via proxy.Via) {
	if v.Snapshot == nil {
		return name, via
	}
	dst := t.Dst()
	for i := range v.Snapshot.Services {
		s := &v.Snapshot.Services[i]
		switch {
		case s.Name.Proto != t.Proto():
		case s.Port == dst.Port() && s.ClusterIP == dst.Addr():
			return s.Name, proxy.ViaClusterIP
		case s.Port == dst.Port() && slices.Contains(s.ExternalIPs, dst.Addr()):
			return s.Name, proxy.ViaExternalIP
		case s.Port == dst.Port() && slices.Contains(s.LoadBalancerIPs, dst.Addr()):
			return s.Name, proxy.ViaLoadBalancer
		case s.NodePort != 0 && s.NodePort == dst.Port() && slices.Contains(v.Snapshot.Node.Addrs, dst.Addr()):
			return s.Name, proxy.ViaNodePort
		}
	}
	return name, via
}

// onNode reports whether an address is the node's own.
func (d *decider) onNode(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	for _, v := range d.refresh() {
		return v.Snapshot != nil && slices.Contains(v.Snapshot.Node.Addrs, a)
	}
	return false
}

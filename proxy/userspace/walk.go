package userspace

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Masquerade is the word for why an endpoint sees the node as its client: the
// process that relays the connection makes another one of its own.
const Masquerade = "relay"

// Walk predicts what becomes of a first packet.
func (p *program) Walk(pkt proxy.Packet) proxy.Outcome {
	dst := pkt.Dst.Addr()
	f := familyOf(dst)
	o, ok := p.claims[f][proxy.Claim{IP: dst, Port: pkt.Dst.Port(), Proto: pkt.Proto}]
	if !ok {
		o, ok = p.claims[f][proxy.Claim{Port: pkt.Dst.Port(), Proto: pkt.Proto}]
		if !ok || !p.servesNodePorts(dst) {
			return proxy.Outcome{}
		}
	}
	u := p.owners[f][o.Unit]
	if u.hash == "" { // not served by this mode
		return proxy.Outcome{}
	}
	has := len(u.sel.Cluster) > 0
	pod := p.render.local(u.family).Local(&pkt)
	local := u.policyLocal(o.Via, pkt.FromNode, pod)
	out := proxy.Outcome{
		Service: u.svc.Name, Via: o.Via, Affinity: u.svc.Affinity,
		Policy: u.sel.Policy, Excluded: u.sel.Excluded,
	}
	eps := u.sel.Cluster
	if local {
		eps, out.Policy, out.Excluded = u.sel.Local, u.sel.LocalPolicy, u.sel.LocalExcluded
	}
	switch {
	case has && o.Via == proxy.ViaLoadBalancer && len(u.svc.SourceRanges) > 0 && !p.inRanges(u, &pkt):
		out.Verdict, out.Reason = proxy.Drop, "source-range"
		out.Policy, out.Excluded = u.sel.Policy, u.sel.Excluded
	case !has:
		out.Verdict, out.Reason = proxy.Reject, "no-endpoints"
	case len(eps) == 0:
		out.Verdict, out.Reason = proxy.Drop, "no-local-endpoints"
	}
	if out.Verdict != proxy.Pass {
		out.Steps = p.steps(u, o.Via, &pkt, false)
		return out
	}
	out.Verdict, out.Algorithm = proxy.Forward, "round-robin"
	if len(eps) == 1 {
		out.Algorithm = "single"
	}
	way := p.steps(u, o.Via, &pkt, true)
	for i := range eps {
		out.Choices = append(out.Choices, proxy.Choice{
			Endpoint: eps[i].Addr, Probability: 1 / float64(len(eps)), Masquerade: Masquerade,
			Steps: append(slices.Clip(way), proxy.Step{
				Hook: "INPUT", Table: tableProxy, Chain: u.svc.Name.String(), Effect: "dial",
				Text:    "accept, dial " + eps[i].Addr.String(),
				Purpose: "accept the connection and dial " + eps[i].Addr.String() + "; dial another endpoint where it does not answer",
			}),
		})
	}
	return out
}

// policyLocal reports whether policy Local governs a connection. Under
// externalTrafficPolicy Local, pods and the node itself are sent as if they had
// left the cluster and come back.
func (u *unit) policyLocal(via proxy.Via, fromNode, pod bool) bool {
	if via == proxy.ViaClusterIP {
		return u.svc.InternalLocal
	}
	return u.svc.ExternalLocal && !fromNode && !pod
}

// viaOf says what an address that was dialled is to the unit.
func (u *unit) viaOf(dst netip.AddrPort) proxy.Via {
	switch a := dst.Addr(); {
	case a == u.svc.ClusterIP:
		return proxy.ViaClusterIP
	case slices.Contains(u.svc.ExternalIPs, a):
		return proxy.ViaExternalIP
	case slices.Contains(u.svc.LoadBalancerIPs, a):
		return proxy.ViaLoadBalancer
	}
	return proxy.ViaNodePort
}

func (p *program) isNode(a netip.Addr) bool {
	return a.IsLoopback() || slices.Contains(p.node.Addrs, a) || slices.Contains(p.render.addrs, a)
}

// servesNodePorts reports whether the rules lead node ports of an address to
// the listener.
func (p *program) servesNodePorts(dst netip.Addr) bool {
	f := familyOf(dst)
	if !p.isNode(dst) || dst.IsLoopback() && (f == xtables.IPv6 || !p.cfg.LocalhostNodePorts) {
		return false
	}
	ranges := p.cfg.NodePorts.Limits(&p.node, f == xtables.IPv6)
	return len(ranges) == 0 || slices.ContainsFunc(ranges, func(r netip.Prefix) bool { return r.Contains(dst) })
}

func (p *program) inRanges(u *unit, pkt *proxy.Packet) bool {
	src := pkt.Src.Addr()
	if slices.ContainsFunc(u.svc.SourceRanges, func(r netip.Prefix) bool { return r.Contains(src) }) {
		return true
	}
	return src == pkt.Dst.Addr() && slices.ContainsFunc(u.svc.SourceRanges, func(r netip.Prefix) bool {
		return slices.ContainsFunc(p.node.Addrs, r.Contains)
	})
}

// steps is the way of a packet through our rules: to the listener, or to the
// rule that refuses it.
func (p *program) steps(u *unit, via proxy.Via, pkt *proxy.Packet, served bool) []proxy.Step {
	chain, hook := chainContainer, "PREROUTING"
	switch {
	case !served && pkt.FromNode:
		chain, hook = chainRefuse, "OUTPUT"
	case !served && p.isNode(pkt.Dst.Addr()):
		chain, hook = chainRefuse, "INPUT"
	case !served:
		chain, hook = chainRefuse, "FORWARD"
	case pkt.FromNode && via == proxy.ViaNodePort:
		chain, hook = chainNodePortHost, "OUTPUT"
	case pkt.FromNode:
		chain, hook = chainHost, "OUTPUT"
	case via == proxy.ViaNodePort:
		chain = chainNodePortContainer
	}
	var out []proxy.Step
	for _, j := range p.jumps[u.family] {
		if j.to == chain && j.chain == hook {
			out = append(out, proxy.Step{Hook: hook, Table: j.table, Chain: j.chain, Text: j.text,
				Purpose: "enter " + chain, Effect: "jump"})
			break
		}
	}
	match := to(pkt.Dst.Addr())
	for i := range u.rules {
		r := &u.rules[i]
		if r.chain != chain || via != proxy.ViaNodePort && !strings.Contains(r.text, match) ||
			via == proxy.ViaNodePort && !served && !strings.Contains(r.text, "--dst-type LOCAL") {
			continue
		}
		s := proxy.Step{Hook: hook, Table: r.table, Chain: r.chain, Text: r.text, Effect: "match",
			Purpose: "report the refusal to the tracer"}
		switch {
		case r.port:
			s.Text, s.Effect = r.text+"PORT"+r.rest, "dnat"
			s.Purpose = "lead the packet to the port at which the proxy listens for " + u.svc.Name.String()
		case strings.HasSuffix(r.text, "-j DROP"):
			s.Effect, s.Purpose = "drop", "drop what may not or cannot reach an endpoint"
		case strings.Contains(r.text, "-j REJECT"):
			s.Effect, s.Purpose = "reject", "refuse connections to a Service without endpoints"
		}
		out = append(out, s)
		if r.port {
			break
		}
	}
	return out
}

// route decides about a connection that came to the unit's listener.
func (p *program) route(u *unit, client netip.Addr, dst netip.AddrPort) (local, fromNode bool) {
	fromNode = p.isNode(client)
	d := p.render.local(u.family)
	pod := d.CIDR.Contains(client)
	if d.Interface != "" { // by which interface it came cannot be told here
		pod = slices.ContainsFunc(p.node.PodCIDRs, func(r netip.Prefix) bool { return r.Contains(client) })
	}
	return u.policyLocal(u.viaOf(dst), fromNode, pod), fromNode
}

// tuple is the key of a connection that came to a listener.
func tuple(proto conntrack.Proto, client, dst netip.AddrPort) conntrack.Tuple {
	return conntrack.NewTuple(proto, client, dst)
}

package iptables

import (
	"net/netip"
	"strings"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Walk evaluates the rules that could concern the packet: the fixed ones and
// those of the Services that have its destination. The Outcome must not be
// changed, for packets from the same kind of source share it. The number of a
// rule in a chain that all Services share is left out, because Apply puts
// additions at its head.
func (p *program) Walk(pkt proxy.Packet) proxy.Outcome {
	var owners []proxy.Owner
	if o, ok := p.claims[proxy.Claim{IP: pkt.Dst.Addr(), Port: pkt.Dst.Port(), Proto: pkt.Proto}]; ok {
		owners = append(owners, o)
	}
	if o, ok := p.claims[proxy.Claim{Port: pkt.Dst.Port(), Proto: pkt.Proto}]; ok && p.local(pkt.Dst.Addr()) {
		owners = append(owners, o)
	}
	key := walkKey{dst: pkt.Dst, proto: pkt.Proto, fromNode: pkt.FromNode, lo: pkt.In == "lo"}
	for i, o := range owners {
		key.units[i] = p.units[o.Unit]
	}
	key.source = p.sourceClass(&pkt, key.units)
	if out, ok := p.walks.Get(key); ok {
		return out
	}
	out := p.walk(pkt, owners)
	p.walks.Put(key, out)
	return out
}

// walkKey is all of a packet that our rules look at.
type walkKey struct {
	dst          netip.AddrPort
	proto        conntrack.Proto
	fromNode, lo bool
	units        [2]*unit
	source       sourceClass
}

// sourceClass is what our rules can tell about a source address.
type sourceClass struct {
	// endpoint is the address where it is an endpoint's or a load balancer's.
	endpoint        netip.Addr
	local, loopback bool
	inCluster       bool
	// ranged is the first source range it is in, from 1.
	ranged int
}

func (p *program) sourceClass(pkt *proxy.Packet, units [2]*unit) sourceClass {
	src := pkt.Src.Addr()
	c := sourceClass{local: p.local(src), loopback: src.IsLoopback(), inCluster: p.cfg.detector(&p.node).Local(pkt)}
	for _, u := range units {
		if u == nil {
			continue
		}
		for _, eps := range [][]proxy.Endpoint{u.sel.Cluster, u.sel.Local} {
			for i := range eps {
				if eps[i].Addr.Addr() == src {
					c.endpoint = src
				}
			}
		}
		for _, ip := range u.svc.LoadBalancerIPs {
			if ip == src {
				c.endpoint = src
			}
		}
		for i, r := range u.svc.SourceRanges {
			if c.ranged == 0 && r.Contains(src) {
				c.ranged = i + 1
			}
		}
	}
	return c
}

// local reports whether an address is the node's, as addrtype LOCAL does.
func (p *program) local(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	for _, n := range p.node.Addrs {
		if n == a {
			return true
		}
	}
	return false
}

// walk is Walk without a cache.
func (p *program) walk(pkt proxy.Packet, owners []proxy.Owner) proxy.Outcome {
	var units []*unit
	for _, o := range owners {
		units = append(units, p.units[o.Unit])
	}
	w := xtables.NewWalker(p.ruleset(units))
	in := xtables.Packet{Proto: pkt.Proto.String(), Src: pkt.Src.Addr(), Dst: pkt.Dst.Addr(),
		SPort: pkt.Src.Port(), DPort: pkt.Dst.Port(), In: pkt.In, State: xtables.StateNew}
	if pkt.Proto == conntrack.TCP {
		in.TCPFlags = tcpSYN
	}
	stations := xtables.Received()
	if pkt.FromNode {
		in.In, stations = "", append(xtables.Sent(), looped()...)
	}
	leaves := w.Walk(in, stations, xtables.Oracles{Local: p.local})
	o := outcomeOf{program: p, owners: owners, texts: make(map[*xtables.Rule]string)}
	for i := range leaves {
		o.leaf(&leaves[i])
	}
	return o.finish()
}

const tcpSYN = 2

// looped are the stations of a packet that the node sent to itself.
func looped() []xtables.Station {
	var out []xtables.Station
	for _, s := range xtables.Received() {
		if s.Chain == "INPUT" {
			out = append(out, s)
		}
	}
	return out
}

// outcomeOf makes an Outcome of the ways a packet can go.
type outcomeOf struct {
	*program
	owners []proxy.Owner
	texts  map[*xtables.Rule]string
	out    proxy.Outcome
	places map[netip.AddrPort]int // of choices
	local  bool                   // the endpoints of policy Local were asked
	owner  *proxy.Owner
}

func (o *outcomeOf) leaf(l *xtables.Leaf) {
	var translated bool
	for i := range l.Steps {
		s := &l.Steps[i]
		if s.Effect == xtables.EffectDNAT {
			translated = true
		}
		if s.Rule != nil && s.Table == "nat" && strings.HasPrefix(s.Rule.Target, prefixEndpoint) {
			o.local = strings.HasPrefix(s.Chain, prefixLocal)
		}
	}
	if translated && l.Verdict == xtables.Accept {
		o.choice(l)
		return
	}
	o.out.Steps = o.steps(l)
	last := xtables.Step{}
	if n := len(l.Steps); n > 0 {
		last = l.Steps[n-1]
	}
	switch l.Verdict {
	case xtables.Accept:
		return
	case xtables.Reject:
		o.out.Verdict, o.out.Reason = proxy.Reject, "no-endpoints"
	default:
		o.out.Verdict, o.out.Reason = proxy.Drop, "no-local-endpoints"
		switch last.Chain {
		case chainProxyFirewall:
			o.out.Reason = "source-range"
		case chainFirewall:
			o.out.Reason = "localnet"
		}
	}
	o.claim(l)
	if o.owner != nil {
		svc := &o.units[o.owner.Unit].svc
		o.local = svc.ExternalLocal && o.out.Reason != "source-range"
		if o.owner.Via == proxy.ViaClusterIP {
			o.local = svc.InternalLocal
		}
	}
}

// claim finds the Service whose rules a way used.
func (o *outcomeOf) claim(l *xtables.Leaf) {
	for i := range o.owners {
		u := o.units[o.owners[i].Unit].render(dispatch)
		for j := range l.Steps {
			s := &l.Steps[j]
			if s.Rule != nil && u.shares(s.Table, s.Chain, o.text(s.Rule)) {
				o.owner = &o.owners[i] // the last one, for the first may have let it pass
			}
		}
	}
}

func (o *outcomeOf) choice(l *xtables.Leaf) {
	o.out.Verdict = proxy.Forward
	ep := netip.AddrPortFrom(l.Packet.Dst, l.Packet.DPort)
	if i, ok := o.places[ep]; ok {
		o.out.Choices[i].Probability += l.Probability
		return
	}
	if o.places == nil {
		o.places = make(map[netip.AddrPort]int)
		o.claim(l)
	}
	o.places[ep] = len(o.out.Choices)
	c := proxy.Choice{Endpoint: ep, Probability: l.Probability, Steps: o.steps(l)}
	if l.Packet.Masqueraded {
		c.Masquerade = masquerade(l)
	}
	o.out.Choices = append(o.out.Choices, c)
}

// masquerade says why a packet is masqueraded, from the rule that marked it.
func masquerade(l *xtables.Leaf) string {
	for i := range l.Steps {
		s := &l.Steps[i]
		if s.Rule == nil || s.Rule.Target != chainMarkMasq {
			continue
		}
		switch {
		case strings.HasPrefix(s.Chain, prefixEndpoint):
			return "hairpin"
		case strings.HasPrefix(s.Chain, prefixExternal) && s.Rule.Match("addrtype") != nil:
			return "node"
		case strings.HasPrefix(s.Chain, prefixExternal):
			return "external"
		case s.Rule.Src.Not, s.Rule.In.Not:
			return "not-local"
		}
		return "all"
	}
	return ""
}

func (o *outcomeOf) finish() proxy.Outcome {
	out := &o.out
	if out.Verdict == proxy.Pass || o.owner == nil {
		return *out
	}
	if out.Verdict == proxy.Forward {
		out.Steps = nil
		out.Algorithm = "random"
		if len(out.Choices) == 1 {
			out.Algorithm = "single"
		}
	}
	u := o.units[o.owner.Unit]
	out.Service, out.Via, out.Affinity = u.svc.Name, o.owner.Via, u.svc.Affinity
	out.Policy, out.Excluded = u.sel.Policy, u.sel.Excluded
	if o.local {
		out.Policy, out.Excluded = u.sel.LocalPolicy, u.sel.LocalExcluded
	}
	return *out
}

func (o *outcomeOf) text(r *xtables.Rule) string {
	s, ok := o.texts[r]
	if !ok {
		s = r.String()
		o.texts[r] = s
	}
	return s
}

func (o *outcomeOf) steps(l *xtables.Leaf) []proxy.Step {
	out := make([]proxy.Step, len(l.Steps))
	for i := range l.Steps {
		s := &l.Steps[i]
		out[i] = proxy.Step{Hook: s.Hook, Table: s.Table, Chain: s.Chain, Effect: s.Effect}
		if s.Rule == nil {
			continue
		}
		out[i].Text, out[i].Purpose = o.text(s.Rule), o.purpose(s)
		if !o.fixed.isShared(s.Table, s.Chain) {
			out[i].Rule = s.Index
		}
	}
	return out
}

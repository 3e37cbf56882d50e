package liverules

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Way is one way a packet can go, and what it means.
type Way struct {
	xtables.Leaf
	// Service and Via are what the packet was addressed to as far as the rules
	// of this way say; zero where they claim it for none.
	Service proxy.PortName
	Via     proxy.Via
	// Endpoint is where it was sent, zero if it was not.
	Endpoint netip.AddrPort
	// Verdict is Pass for a packet that no Service claimed and no rule stopped.
	// Unsure says that the rules do not tell what becomes of it.
	Verdict proxy.Verdict
	Unsure  bool
	// Reason is a stable code where Verdict is Reject or Drop, and Owner whose
	// rule or policy it was.
	Reason, Owner string
	// Masquerade is why its source is replaced, empty if it is not.
	Masquerade string
	// Picked is how many of the Assumptions came before the endpoint was picked.
	Picked int
	// Local says that the endpoints of policy Local were asked.
	Local bool
}

// Ways is Leaves with their meaning.
func (p *Program) Ways(pkt proxy.Packet) []Way {
	leaves := p.Leaves(pkt)
	ways := make([]Way, len(leaves))
	for i := range leaves {
		ways[i] = p.way(&leaves[i])
	}
	return ways
}

func (p *Program) way(l *xtables.Leaf) Way {
	w := Way{Leaf: *l}
	picked := -1
	for i := range l.Steps {
		s := &l.Steps[i]
		if s.Effect == xtables.EffectDNAT || s.Effect == xtables.EffectRedirect {
			picked = i
			w.Endpoint = s.DstAfter
		}
		if s.Rule == nil {
			continue
		}
		if s.Table == "nat" && (s.Chain == chainServices || s.Chain == chainNodePorts) {
			if _, name, _, ok := p.Chain(s.Rule.Target); ok {
				_, about, _ := strings.Cut(s.Rule.Comment(), " ")
				w.Service, w.Via = name, viaOf(about)
				if s.Chain == chainNodePorts {
					w.Via = proxy.ViaNodePort
				}
			}
		}
		if s.Table == "nat" && KindOf(s.Rule.Target) == KindEndpoint {
			w.Local = KindOf(s.Chain) == KindLocal
		}
	}
	for i := range l.Assumptions {
		if picked >= 0 && l.Assumptions[i].After <= picked {
			w.Picked++
		}
	}
	if picked < 0 {
		w.Picked = len(l.Assumptions)
	}
	if l.Packet.Masqueraded {
		w.Masquerade = Masquerade(l)
	}
	w.judge(l)
	if n := len(l.Steps); w.Reason == "policy-drop" && l.Steps[n-1].Table == "filter" {
		for _, f := range p.families {
			if (f.rules.Family == xtables.IPv6) == l.Packet.Dst.Is6() {
				w.Owner = PolicyOwner(f.rules, l.Steps[n-1].Chain)
			}
		}
	}
	return w
}

// judge sets verdict, reason and owner.
func (w *Way) judge(l *xtables.Leaf) {
	var last xtables.Step
	if n := len(l.Steps); n > 0 {
		last = l.Steps[n-1]
	}
	switch l.Verdict {
	case xtables.Accept:
		if w.Endpoint.IsValid() {
			w.Verdict = proxy.Forward
		}
		return
	case xtables.Lost:
		w.Unsure = true
		return
	case xtables.Reject:
		w.Verdict = proxy.Reject
	case xtables.Drop:
		w.Verdict = proxy.Drop
	}
	w.Owner = Owner(last.Table, last.Chain, last.Rule)
	if last.Rule == nil {
		w.Reason = "policy-drop"
		return
	}
	w.Reason = "dropped-by-rule"
	if name, ok := ruleService(last.Rule); ok && strings.HasPrefix(last.Chain, "KUBE-") {
		w.Service = name
		_, about, _ := strings.Cut(last.Rule.Comment(), " ")
		switch {
		case last.Chain == chainProxyFirewall:
			w.Reason, w.Via = "source-range", proxy.ViaLoadBalancer
		case strings.Contains(about, "no local endpoints"):
			w.Reason = "no-local-endpoints"
		case strings.Contains(about, "no endpoints"):
			w.Reason = "no-endpoints"
		}
		if w.Via == "" {
			w.Via = proxy.ViaClusterIP
			if last.Chain == chainExternalServices {
				w.Via = proxy.ViaExternalIP
				if last.Rule.Match("addrtype") != nil {
					w.Via = proxy.ViaNodePort
				}
			}
		}
	} else if last.Chain == chainFirewall && strings.Contains(last.Rule.Comment(), "localnet") {
		w.Reason = "localnet"
	}
}

// Masquerade says why a packet is masqueraded, from the rule that marked it:
// see proxy.Choice. "other" is a rule that is not kube-proxy's.
func Masquerade(l *xtables.Leaf) string {
	for i := range l.Steps {
		s := &l.Steps[i]
		if s.Rule == nil || s.Rule.Target != chainMarkMasq {
			continue
		}
		switch KindOf(s.Chain) {
		case KindEndpoint:
			return "hairpin"
		case KindExternal:
			if s.Rule.Match("addrtype") != nil {
				return "node"
			}
			return "external"
		}
		if s.Rule.Src.Not || s.Rule.In.Not {
			return "not-local"
		}
		return "all"
	}
	for i := range l.Steps {
		if l.Steps[i].Effect == xtables.EffectMasquerade {
			return "other"
		}
	}
	return ""
}

// Walk predicts what becomes of a first packet, in the terms of all modes. What
// cannot be evaluated is taken not to match where it would decide on the pick;
// after the pick, an endpoint counts if any way to it is open. Ways tells all.
func (p *Program) Walk(pkt proxy.Packet) proxy.Outcome {
	ways := p.Ways(pkt)
	var out proxy.Outcome
	places := make(map[netip.AddrPort]int)
	// The ways on which nothing unknown was taken to hold come last.
	for i := range slices.Backward(ways) {
		w := &ways[i]
		if slices.ContainsFunc(w.Assumptions[:w.Picked], held) {
			continue
		}
		before := slices.ContainsFunc(w.Assumptions[w.Picked:], held)
		if w.Service != (proxy.PortName{}) && out.Service == (proxy.PortName{}) {
			out.Service, out.Via = w.Service, w.Via
			out.Policy = proxy.PolicyCluster
			if w.Local {
				out.Policy = proxy.PolicyLocal
			}
		}
		switch {
		case w.Endpoint.IsValid():
			j, ok := places[w.Endpoint]
			if !ok {
				j = len(out.Choices)
				places[w.Endpoint] = j
				out.Choices = append(out.Choices, proxy.Choice{Endpoint: w.Endpoint})
			}
			c := &out.Choices[j]
			if !before {
				c.Probability += w.Probability
			}
			if w.Verdict == proxy.Forward || c.Steps == nil {
				c.Masquerade, c.Steps = w.Masquerade, p.Steps(w.Leaf.Steps)
			}
			if w.Verdict == proxy.Forward {
				out.Verdict, out.Reason = proxy.Forward, ""
			} else if out.Verdict == proxy.Pass {
				out.Verdict, out.Reason = w.Verdict, w.Reason
			}
		case out.Verdict == proxy.Pass && out.Steps == nil:
			out.Verdict, out.Reason, out.Steps = w.Verdict, w.Reason, p.Steps(w.Leaf.Steps)
		}
	}
	slices.Reverse(out.Choices)
	if out.Verdict == proxy.Forward {
		out.Steps = nil
		out.Algorithm = "random"
		if len(out.Choices) == 1 {
			out.Algorithm = "single"
		}
	} else if len(out.Choices) > 0 {
		out.Steps, out.Choices = out.Choices[0].Steps, nil
	}
	if s := p.service(out.Service, pkt.Dst.Addr()); s != nil {
		out.Affinity = s.Affinity
	}
	p.policy(&out, pkt.Dst.Addr().Is6())
	return out
}

// policy says what the Snapshot knows of the policy behind an outcome.
func (p *Program) policy(out *proxy.Outcome, six bool) {
	if p.cfg.Snapshot == nil || out.Verdict == proxy.Pass {
		return
	}
	for i := range p.cfg.Snapshot.Services {
		svc := &p.cfg.Snapshot.Services[i]
		if svc.Name != out.Service || svc.Is6() != six {
			continue
		}
		sel := svc.Select(p.cfg.Snapshot.Node, p.cfg.Overlay)
		local := out.Policy == proxy.PolicyLocal
		if out.Verdict != proxy.Forward {
			local = out.Reason != "source-range" && (svc.ExternalLocal && out.Via != proxy.ViaClusterIP ||
				svc.InternalLocal && out.Via == proxy.ViaClusterIP)
		}
		out.Policy, out.Excluded, out.Affinity = sel.Policy, sel.Excluded, svc.Affinity
		if local {
			out.Policy, out.Excluded = sel.LocalPolicy, sel.LocalExcluded
		}
		return
	}
}

func held(a xtables.Assumption) bool { return a.Held }

func (p *Program) service(n proxy.PortName, dst netip.Addr) *Service {
	f := p.family(dst)
	if f == nil || n == (proxy.PortName{}) {
		return nil
	}
	if i, ok := slices.BinarySearchFunc(f.services, n, func(s *Service, n proxy.PortName) int { return s.Name.Compare(n) }); ok {
		return f.services[i]
	}
	return nil
}

// Steps puts the steps of a walk into the terms of all modes.
func (p *Program) Steps(steps []xtables.Step) []proxy.Step {
	out := make([]proxy.Step, len(steps))
	for i := range steps {
		s := &steps[i]
		out[i] = proxy.Step{Hook: s.Hook, Table: s.Table, Chain: s.Chain, Effect: s.Effect}
		if s.Rule != nil {
			out[i].Rule, out[i].Text, out[i].Purpose = s.Index, s.Rule.String(), p.Purpose(s.Table, s.Chain, s.Rule)
		}
	}
	return out
}

// Snapshot puts what the rules say in the place of what an API server would,
// for a node on which there is none to ask. Endpoints that are in no rule are
// unknown to it, and all others count as ready.
func (p *Program) Snapshot(node proxy.Node) *proxy.Snapshot {
	s := &proxy.Snapshot{Node: node}
	for _, live := range p.Services() {
		svc := proxy.Service{Name: live.Name, Type: "ClusterIP", Affinity: live.Affinity, SourceRanges: live.Ranges}
		for i := range live.Fronts {
			f := &live.Fronts[i]
			switch f.Via {
			case proxy.ViaClusterIP:
				svc.ClusterIP, svc.Port = f.Addr, f.Port
				svc.InternalLocal = KindOf(f.Chain) == KindLocal
			case proxy.ViaNodePort:
				svc.NodePort = f.Port
				if svc.Type == "ClusterIP" {
					svc.Type = "NodePort"
				}
			case proxy.ViaExternalIP:
				svc.ExternalIPs = append(svc.ExternalIPs, f.Addr)
			case proxy.ViaLoadBalancer:
				svc.LoadBalancerIPs = append(svc.LoadBalancerIPs, f.Addr)
				svc.Type = "LoadBalancer"
			}
			for _, c := range f.Choices {
				if !slices.ContainsFunc(svc.Endpoints, func(e proxy.Endpoint) bool { return e.Addr == c.Endpoint }) {
					svc.Endpoints = append(svc.Endpoints, proxy.Endpoint{Addr: c.Endpoint, Ready: true, Serving: true})
				}
			}
		}
		slices.SortFunc(svc.Endpoints, func(a, b proxy.Endpoint) int { return strings.Compare(a.Addr.String(), b.Addr.String()) })
		s.Services = append(s.Services, svc)
	}
	return s
}

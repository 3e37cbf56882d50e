package liverules

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Service is a Service port as the rules of one family have it.
type Service struct {
	Name proxy.PortName
	IP6  bool
	// Fronts are its addresses in the order of the rules.
	Fronts []Front
	// Affinity is the timeout of session affinity, zero for none.
	Affinity time.Duration
	// Ranges are the source ranges of its load balancers.
	Ranges []netip.Prefix
}

// Front is one address of a Service port, and where it leads.
type Front struct {
	Via proxy.Via
	// Addr is invalid for a node port, which is on addresses of the node.
	Addr netip.Addr
	Port uint16
	// Chain is the chain that decides, empty where the rules refuse.
	Chain string
	// Choices are the endpoints and their odds without an affinity entry, for a
	// client outside the cluster where that matters.
	Choices []proxy.Choice
	// Missing is the chance that no endpoint is picked although the chain was
	// entered; above zero only where rules are missing or wrong.
	Missing float64
	// Verdict is Forward where there are Choices, else Reject or Drop as the
	// rules say, or Pass where they say nothing.
	Verdict proxy.Verdict
	Reason  string
}

// String returns "10.96.0.10:80", or "*:30080" for a node port.
func (f *Front) String() string {
	if !f.Addr.IsValid() {
		return "*:" + strconv.Itoa(int(f.Port))
	}
	return netip.AddrPortFrom(f.Addr, f.Port).String()
}

// reader collects Services of one family.
type reader struct {
	*family
	byName map[proxy.PortName]*Service
}

// read finds all Services, their chains and their endpoints.
func (f *family) read() {
	r := reader{family: f, byName: make(map[proxy.PortName]*Service)}
	nat := f.rules.Table("nat")
	for _, name := range []string{chainServices, chainNodePorts} {
		if c := nat.Chain(name); c != nil {
			for _, rule := range c.Rules {
				r.front(name, rule)
			}
		}
	}
	filter := f.rules.Table("filter")
	for _, name := range []string{chainServices, chainExternalServices} {
		if c := filter.Chain(name); c != nil {
			for _, rule := range c.Rules {
				r.refusal(rule)
			}
		}
	}
	slices.SortFunc(f.services, func(a, b *Service) int { return a.Name.Compare(b.Name) })
	for _, s := range f.services {
		slices.SortStableFunc(s.Fronts, func(a, b Front) int {
			return cmp.Or(cmp.Compare(viaOrder(a.Via), viaOrder(b.Via)), a.Addr.Compare(b.Addr))
		})
		for i := range s.Fronts {
			r.odds(s, &s.Fronts[i])
		}
	}
}

func viaOrder(v proxy.Via) int {
	return slices.Index([]proxy.Via{proxy.ViaClusterIP, proxy.ViaExternalIP, proxy.ViaLoadBalancer, proxy.ViaNodePort}, v)
}

func (r *reader) service(n proxy.PortName) *Service {
	s := r.byName[n]
	if s == nil {
		s = &Service{Name: n, IP6: r.rules.Family == xtables.IPv6}
		r.byName[n] = s
		r.services = append(r.services, s)
	}
	return s
}

// front reads a rule of nat that leads to a chain of a Service port.
func (r *reader) front(chain string, rule *xtables.Rule) {
	kind := KindOf(rule.Target)
	proto, ok := protocol(rule.Proto.Name)
	if kind == KindNone || kind == KindEndpoint || !ok || rule.Proto.Not {
		if chain == chainServices && rule.Target == chainNodePorts && rule.Dst.Prefix.IsSingleIP() && !rule.Dst.Not {
			r.nodeAddrs = append(r.nodeAddrs, rule.Dst.Prefix.Addr())
		}
		return
	}
	key, about, _ := strings.Cut(rule.Comment(), " ")
	name, ok := parseKey(key, proto)
	if !ok { // without a comment the chain is all that we can call it by
		name = proxy.PortName{Name: rule.Target, Proto: proto}
	}
	f := Front{Port: dport(rule, rule.Proto.Name), Chain: rule.Target}
	switch {
	case chain == chainNodePorts:
		if rule.Dst.Prefix.IsValid() {
			return // the same once more, to count uses of localhost
		}
		f.Via = proxy.ViaNodePort
	case !rule.Dst.Prefix.IsSingleIP() || rule.Dst.Not:
		return
	default:
		f.Addr, f.Via = rule.Dst.Prefix.Addr(), viaOf(about)
	}
	s := r.service(name)
	if slices.ContainsFunc(s.Fronts, func(o Front) bool { return o.Via == f.Via && o.Addr == f.Addr && o.Port == f.Port }) {
		return // a later rule of the same match is never met
	}
	s.Fronts = append(s.Fronts, f)
	r.chains[rule.Target] = chainInfo{kind: kind, service: s}
	if f.Via == proxy.ViaClusterIP {
		r.clusterIPs[f.Addr] = true
	}
	r.follow(s, rule.Target, 0)
}

// viaOf tells the kind of an address from what a comment says of it.
func viaOf(about string) proxy.Via {
	switch {
	case strings.HasPrefix(about, "external IP"):
		return proxy.ViaExternalIP
	case strings.HasPrefix(about, "loadbalancer IP"):
		return proxy.ViaLoadBalancer
	}
	return proxy.ViaClusterIP
}

func dport(rule *xtables.Rule, match string) uint16 {
	if m := rule.Match(match); m != nil {
		if o := m.Opt("dport"); o != nil {
			if n, err := strconv.ParseUint(o.Value(), 10, 16); err == nil {
				return uint16(n)
			}
		}
	}
	return 0
}

// follow notes all chains that a chain of a Service port leads to.
func (r *reader) follow(s *Service, chain string, depth int) {
	c := r.rules.Chain("nat", chain)
	if c == nil || depth > 4 {
		return
	}
	kind := KindOf(chain)
	for _, rule := range c.Rules {
		if kind == KindFirewall && rule.Src.Prefix.IsValid() && KindOf(rule.Target) == KindExternal &&
			!slices.Contains(s.Ranges, rule.Src.Prefix) {
			s.Ranges = append(s.Ranges, rule.Src.Prefix)
		}
		if m := rule.Match("recent"); m != nil && m.Opt("rcheck") != nil {
			if o := m.Opt("seconds"); o != nil {
				if n, err := strconv.Atoi(o.Value()); err == nil {
					s.Affinity = time.Duration(n) * time.Second
				}
			}
		}
		if rule.Target == chainMarkMasq && rule.Src.Not && rule.Src.Prefix.IsValid() && !slices.Contains(r.podRanges, rule.Src.Prefix) {
			r.podRanges = append(r.podRanges, rule.Src.Prefix)
		}
		if kind == KindEndpoint && rule.Target == "DNAT" {
			if to, ok := rule.TargetOpt("to-destination"); ok {
				if ep, err := netip.ParseAddrPort(to); err == nil {
					r.chains[chain] = chainInfo{kind: kind, service: s, endpoint: ep}
					r.endpoints[ep] = append(r.endpoints[ep], s)
				}
			}
		}
		next := KindOf(rule.Target)
		if next == KindNone {
			continue
		}
		if _, known := r.chains[rule.Target]; !known {
			r.chains[rule.Target] = chainInfo{kind: next, service: s}
			r.follow(s, rule.Target, depth+1)
		}
	}
}

// refusal reads a rule of filter that refuses connections to a Service port.
func (r *reader) refusal(rule *xtables.Rule) {
	proto, ok := protocol(rule.Proto.Name)
	if !ok || rule.Target != "REJECT" && rule.Target != "DROP" {
		return
	}
	key, about, _ := strings.Cut(rule.Comment(), " ")
	name, ok := parseKey(key, proto)
	if !ok {
		return
	}
	f := Front{Port: dport(rule, rule.Proto.Name), Via: proxy.ViaClusterIP, Verdict: proxy.Reject, Reason: "no-endpoints"}
	if rule.Target == "DROP" || strings.Contains(about, "no local endpoints") {
		f.Verdict, f.Reason = proxy.Drop, "no-local-endpoints"
	}
	switch {
	case rule.Dst.Prefix.IsSingleIP():
		f.Addr = rule.Dst.Prefix.Addr()
	case rule.Match("addrtype") != nil:
		f.Via = proxy.ViaNodePort
	default:
		return
	}
	s := r.service(name)
	for i := range s.Fronts { // as the chain for local clients stays, the rule is for those outside
		if o := &s.Fronts[i]; o.Addr == f.Addr && o.Port == f.Port {
			o.Verdict, o.Reason = f.Verdict, f.Reason
			return
		}
	}
	if f.Addr.IsValid() && len(s.Fronts) > 0 && slices.ContainsFunc(s.Fronts, func(o Front) bool { return o.Via == proxy.ViaClusterIP }) {
		f.Via = proxy.ViaExternalIP // which of the two kinds, the rule does not say
	} else if f.Addr.IsValid() {
		r.clusterIPs[f.Addr] = true
	}
	s.Fronts = append(s.Fronts, f)
}

// odds walks the chain of a front.
func (r *reader) odds(s *Service, f *Front) {
	if f.Chain == "" {
		return
	}
	src, local := netip.AddrFrom4([4]byte{198, 51, 100, 254}), false
	if s.IP6 {
		src = netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: 0xfe})
	}
	if KindOf(f.Chain) == KindFirewall && len(s.Ranges) > 0 {
		src = s.Ranges[0].Addr()
	}
	dst := f.Addr
	if !dst.IsValid() {
		dst, local = netip.AddrFrom4([4]byte{192, 0, 2, 1}), true
		if s.IP6 {
			dst = netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: 1})
		}
	}
	pkt := xtables.Packet{Proto: s.Name.Proto.String(), Src: src, Dst: dst, SPort: 1024, DPort: f.Port, State: xtables.StateNew}
	leaves := r.walker.Walk(pkt, []xtables.Station{{Hook: "prerouting", Table: "nat", Chain: f.Chain, If: xtables.Unknown}},
		xtables.Oracles{Local: func(a netip.Addr) bool { return local && a == dst }})
	for i := range leaves {
		l := &leaves[i]
		if l.Packet.State&xtables.StateDNAT == 0 {
			f.Missing += l.Probability
			continue
		}
		ep := netip.AddrPortFrom(l.Packet.Dst, l.Packet.DPort)
		if j := slices.IndexFunc(f.Choices, func(c proxy.Choice) bool { return c.Endpoint == ep }); j >= 0 {
			f.Choices[j].Probability += l.Probability
		} else {
			f.Choices = append(f.Choices, proxy.Choice{Endpoint: ep, Probability: l.Probability, Masquerade: Masquerade(l)})
		}
	}
	switch {
	case f.Verdict != proxy.Pass: // refused, whatever the chain has for clients on the node
		f.Choices, f.Missing = nil, 0
	case len(f.Choices) > 0:
		f.Verdict = proxy.Forward
	}
	if f.Missing < 1e-6 {
		f.Missing = 0
	}
}

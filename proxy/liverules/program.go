package liverules

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Config is what the rules do not say. Every field may be zero.
type Config struct {
	// Addrs are the node's own addresses; nil means that they are not known,
	// and a walk goes both ways where it matters.
	Addrs []netip.Addr
	// Set tells whether a packet is in an ipset, as in xtables.Oracles.
	Set func(name string, dirs []string, p *xtables.Packet) xtables.Tri
	// Recent tells whether the source of a packet is in a list of xt_recent.
	// Nil: it is not, so odds are those without an affinity entry.
	Recent func(list string, p *xtables.Packet) xtables.Tri
	// Route sets the interfaces of a packet whose destination may have changed.
	// Nil: interfaces are not known, except that what is for or from 127.0.0.1
	// goes by lo.
	Route func(p *xtables.Packet)
	// Snapshot is the state that the rules should follow, from which Walk takes
	// what no rule says: the policy applied, and how many endpoints are no
	// candidates. Nil: Walk says only what rules say.
	Snapshot *proxy.Snapshot
	// Overlay is what is out for a time besides.
	Overlay proxy.Overlay
}

// Program is what a live ruleset means. It implements proxy.Program, is
// immutable and safe for concurrent use.
type Program struct {
	cfg      Config
	families []*family
	index    proxy.Index
}

var _ proxy.Program = (*Program)(nil)

// family is one ruleset and what was found in it.
type family struct {
	rules      *xtables.Ruleset
	walker     *xtables.Walker
	services   []*Service
	chains     map[string]chainInfo
	endpoints  map[netip.AddrPort][]*Service
	clusterIPs map[netip.Addr]bool
	// nodeAddrs and podRanges are addresses that the rules name as such.
	nodeAddrs []netip.Addr
	podRanges []netip.Prefix
}

// chainInfo is whose a chain of nat is.
type chainInfo struct {
	kind     Kind
	service  *Service
	endpoint netip.AddrPort
}

// New reads rulesets, which must not change any more. Of each family there is
// at most one.
func New(cfg Config, rulesets ...*xtables.Ruleset) *Program {
	p := &Program{cfg: cfg, index: make(proxy.Index)}
	for _, rs := range rulesets {
		f := &family{
			rules: rs, walker: xtables.NewWalker(rs), chains: make(map[string]chainInfo),
			endpoints: make(map[netip.AddrPort][]*Service), clusterIPs: make(map[netip.Addr]bool),
		}
		f.read()
		p.families = append(p.families, f)
		p.tagged(f)
	}
	return p
}

// Services lists what was found, by name, IPv4 before IPv6.
func (p *Program) Services() []*Service {
	var all []*Service
	for _, f := range p.families {
		all = append(all, f.services...)
	}
	slices.SortStableFunc(all, func(a, b *Service) int { return a.Name.Compare(b.Name) })
	return all
}

// Rulesets returns what New got.
func (p *Program) Rulesets() []*xtables.Ruleset {
	var all []*xtables.Ruleset
	for _, f := range p.families {
		all = append(all, f.rules)
	}
	return all
}

// Mode tells which mode of kube-proxy wrote the rules, empty if none did.
func (p *Program) Mode() proxy.Mode {
	for _, f := range p.families {
		switch {
		case f.rules.Chain("filter", "KUBE-IPVS-FILTER") != nil || f.matchesSet("KUBE-CLUSTER-IP"):
			return proxy.IPVS
		case f.rules.Chain("nat", "KUBE-PORTALS-CONTAINER") != nil:
			return proxy.Userspace
		case f.rules.Chain("nat", chainServices) != nil:
			return proxy.IPTables
		}
	}
	return ""
}

func (f *family) matchesSet(name string) bool {
	c := f.rules.Chain("nat", chainServices)
	return c != nil && slices.ContainsFunc(c.Rules, func(r *xtables.Rule) bool {
		m := r.Match("set")
		return m != nil && m.Opt("match-set") != nil && strings.HasSuffix(m.Opt("match-set").Value(), strings.TrimPrefix(name, "KUBE"))
	})
}

// Chain tells whose a chain of nat is: the Service port, and for KindEndpoint
// the endpoint. ok is false for chains of no Service.
func (p *Program) Chain(name string) (kind Kind, service proxy.PortName, endpoint netip.AddrPort, ok bool) {
	for _, f := range p.families {
		if c, found := f.chains[name]; found {
			return c.kind, c.service.Name, c.endpoint, true
		}
	}
	return KindNone, proxy.PortName{}, netip.AddrPort{}, false
}

// AffinityLists lists the endpoints' lists of clients, by name.
func (p *Program) AffinityLists() (all []proxy.AffinityList) {
	for _, f := range p.families {
		for name, c := range f.chains {
			if c.kind == KindEndpoint && c.service.Affinity > 0 {
				all = append(all, proxy.AffinityList{Name: name, Service: c.service.Name, Endpoint: c.endpoint, Timeout: c.service.Affinity})
			}
		}
	}
	slices.SortFunc(all, func(a, b proxy.AffinityList) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// PodRanges are the ranges by which the rules tell pods from others, none if they
// tell them by interface or not at all.
func (p *Program) PodRanges() []netip.Prefix {
	var all []netip.Prefix
	for _, f := range p.families {
		all = append(all, f.podRanges...)
	}
	return all
}

// Index lists the rules that carry tags of ours, if ours wrote them.
func (p *Program) Index() proxy.Index { return p.index }

func (p *Program) tagged(f *family) {
	for _, t := range f.rules.Tables {
		for _, c := range t.Chains {
			for _, r := range c.Rules {
				prefix, ok := r.TargetOpt("nflog-prefix")
				if !ok {
					continue
				}
				tag, ok := proxy.ParseTag(prefix)
				if !ok {
					continue
				}
				rule := &proxy.Rule{Tag: tag, Table: t.Name, Chain: c.Name, Purpose: p.Purpose(t.Name, c.Name, r)}
				if info, ok := f.chains[c.Name]; ok {
					rule.Service, rule.Endpoint = info.service.Name, info.endpoint
				} else if name, ok := ruleService(r); ok {
					rule.Service = name
				}
				switch {
				case tag.Kind == proxy.TagReject:
					rule.Reason = "no-endpoints"
				case tag.Kind == proxy.TagDrop && c.Name == chainProxyFirewall:
					rule.Reason = "source-range"
				case tag.Kind == proxy.TagDrop:
					rule.Reason = "no-local-endpoints"
				}
				p.index[tag.String()] = rule
			}
		}
	}
}

// ruleService names the Service port in a rule's comment.
func ruleService(r *xtables.Rule) (proxy.PortName, bool) {
	proto, ok := protocol(r.Proto.Name)
	if !ok {
		return proxy.PortName{}, false
	}
	key, _, _ := strings.Cut(r.Comment(), " ")
	return parseKey(key, proto)
}

// Text returns the rules as iptables-save prints them.
func (p *Program) Text() string {
	var b strings.Builder
	for _, f := range p.families {
		b.WriteString(f.rules.String())
	}
	return b.String()
}

// Problems is empty: what is wrong with rules, a check says.
func (p *Program) Problems() []proxy.Problem { return nil }

func (p *Program) family(a netip.Addr) *family {
	want := xtables.IPv4
	if a.Is6() && !a.Is4In6() {
		want = xtables.IPv6
	}
	for _, f := range p.families {
		if f.rules.Family == want {
			return f
		}
	}
	return nil
}

// maybeLocal tells whether an address is the node's.
func (p *Program) maybeLocal(f *family) func(netip.Addr) xtables.Tri {
	return func(a netip.Addr) xtables.Tri {
		switch {
		case a.IsLoopback(), slices.Contains(p.cfg.Addrs, a), slices.Contains(f.nodeAddrs, a):
			return xtables.Yes
		case p.cfg.Addrs != nil, f.clusterIPs[a], a.IsMulticast():
			return xtables.No
		case slices.ContainsFunc(f.podRanges, func(r netip.Prefix) bool { return r.Contains(a) }):
			return xtables.No // a pod, for kube-proxy tells pods by this range
		}
		return xtables.Unknown
	}
}

// set answers what the Config tells. Where that does not know the sets of our own,
// which say of what to report and decide nothing, they hold the addresses of Services,
// and their endpoints.
func (p *Program) set(f *family) func(string, []string, *xtables.Packet) xtables.Tri {
	return func(name string, dirs []string, pkt *xtables.Packet) xtables.Tri {
		if p.cfg.Set != nil {
			if t := p.cfg.Set(name, dirs, pkt); t != xtables.Unknown {
				return t
			}
		}
		found := false
		switch {
		case strings.HasPrefix(name, "KPTRACE-") && len(dirs) > 0 && dirs[0] == "dst":
			found = slices.ContainsFunc(f.services, func(s *Service) bool {
				return slices.ContainsFunc(s.Fronts, func(x Front) bool { return x.Addr == pkt.Dst && x.Port == pkt.DPort })
			})
		case strings.HasPrefix(name, "KPTRACE-"):
			found = f.endpoints[netip.AddrPortFrom(pkt.Src, pkt.SPort)] != nil
		default:
			return xtables.Unknown
		}
		if found {
			return xtables.Yes
		}
		return xtables.No
	}
}

// device tells what can be known of interfaces without a routing table.
func device(name string, out bool, p *xtables.Packet) xtables.Tri {
	a := p.Src
	if out {
		a = p.Dst
	}
	if lo := name == "lo"; lo == a.IsLoopback() {
		if lo {
			return xtables.Yes
		}
		return xtables.Unknown
	}
	return xtables.No
}

const tcpSYN = 2

// Leaves returns every way that the first packet of a connection can go through
// all chains of its family: by chance, and by what could not be evaluated. It is
// empty if there are no rules of the family.
func (p *Program) Leaves(pkt proxy.Packet) []xtables.Leaf {
	f := p.family(pkt.Dst.Addr())
	if f == nil {
		return nil
	}
	stations := xtables.Received()
	if pkt.FromNode {
		stations = xtables.Sent()
		for _, s := range xtables.Received() {
			if s.Chain == "INPUT" { // what the node sends to itself comes back by lo
				s.In = "lo"
				stations = append(stations, s)
			}
		}
	}
	return p.walk(f, first(pkt), stations, p.oracles(f, pkt.FromNode, xtables.Unknown))
}

// first is a connection's first packet as a walk takes it.
func first(pkt proxy.Packet) xtables.Packet {
	in := xtables.Packet{Proto: pkt.Proto.String(), Src: pkt.Src.Addr(), Dst: pkt.Dst.Addr(),
		SPort: pkt.Src.Port(), DPort: pkt.Dst.Port(), In: pkt.In, State: xtables.StateNew}
	if pkt.FromNode {
		in.In = ""
	}
	return in
}

// Station returns every way that a first packet can go through one built-in chain: for
// whoever walks what is between these. It is empty if there are no rules of the family.
func (p *Program) Station(pkt xtables.Packet, s xtables.Station, fromNode bool) []xtables.Leaf {
	f := p.family(pkt.Dst)
	if f == nil || f.rules.Table(s.Table).Chain(s.Chain) == nil {
		return nil
	}
	return p.walk(f, pkt, []xtables.Station{s}, p.oracles(f, fromNode, xtables.Unknown))
}

func (p *Program) walk(f *family, in xtables.Packet, stations []xtables.Station, o xtables.Oracles) []xtables.Leaf {
	if in.Proto == conntrack.TCP.String() && in.TCPFlags == 0 {
		in.TCPFlags = tcpSYN
	}
	return f.walker.Walk(in, stations, o)
}

// oracles answer for a packet that the node sends, or that comes in, and of which
// IPVS has picked the destination, or has not.
func (p *Program) oracles(f *family, fromNode bool, picked xtables.Tri) xtables.Oracles {
	o := xtables.Oracles{MaybeLocal: p.maybeLocal(f), Set: p.set(f), Recent: p.cfg.Recent, Route: p.cfg.Route, Device: device}
	if fromNode {
		o.Device = func(name string, out bool, p *xtables.Packet) xtables.Tri {
			if !out {
				return xtables.No
			}
			return device(name, out, p)
		}
	}
	o.Other = func(_ *xtables.Rule, m *xtables.Match, _ *xtables.Packet) xtables.Tri {
		switch {
		case m.Name != "ipvs" || len(m.Opts) != 1 || m.Opts[0].Name != "ipvs" || picked == xtables.Unknown:
			return xtables.Unknown
		case m.Opts[0].Not:
			return xtables.Yes - picked
		}
		return picked
	}
	return o
}

package nftables

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
)

// Config is what the rules do not say.
type Config struct {
	// Addrs are the node's own addresses; those that serve node ports are known
	// from the rules besides.
	Addrs []netip.Addr
	// Beside are the rules of iptables on the same node, which packets meet in
	// between; nil for none.
	Beside *liverules.Program
	// Others says that tables of others are walked too: those of ip, ip6 and inet,
	// but of iptables-nft only without Beside.
	Others bool
	// Clients says that the text is as fresh as a packet to be walked, so that the
	// sets of clients with session affinity hold. Otherwise a walk is that of a
	// client in none.
	Clients bool
}

// Program is what the rules mean. It has one user at a time.
type Program struct {
	cfg      Config
	tables   []*table
	foreign  []*table
	services []*liverules.Service
	others   int
	order    []string
	// podRanges are those by which rules tell pods from others.
	podRanges []netip.Prefix
	// unknown are rules that could not be evaluated, strange those of them in
	// kube-proxy's tables.
	unknown map[Doubt]bool
	strange map[string]bool
}

// Doubt is a rule that could not be evaluated and was taken not to match: at which
// hook it was met, in which table, and as it was printed.
type Doubt struct{ Hook, Table, Text string }

// Parse reads what nft list ruleset prints, with -j or without.
func Parse(cfg Config, text string) (*Program, error) {
	if IsJSON(text) {
		var err error
		if text, err = FromJSON([]byte(text)); err != nil {
			return nil, err
		}
	}
	r := &parser{text: text}
	r.words, r.ends = lex(text)
	if err := r.parse(); err != nil {
		return nil, err
	}
	p := &Program{
		cfg: cfg, tables: r.tables, foreign: r.foreign, others: r.others, order: r.order,
		unknown: map[Doubt]bool{}, strange: map[string]bool{},
	}
	for _, t := range p.tables {
		p.services = append(p.services, p.read(t)...)
	}
	p.podRanges = p.findPodRanges()
	slices.SortStableFunc(p.services, func(a, b *liverules.Service) int { return a.Name.Compare(b.Name) })
	return p, nil
}

// Mode is proxy.NFTables where there is a table of kube-proxy's, else empty.
func (p *Program) Mode() proxy.Mode {
	if len(p.tables) == 0 {
		return ""
	}
	return proxy.NFTables
}

// Services lists what was found, by name, IPv4 before IPv6.
func (p *Program) Services() []*liverules.Service { return p.services }

// Others is how many tables there are that are not kube-proxy's; they are walked with
// Config.Others only.
func (p *Program) Others() int { return p.others }

// Unknown lists rules that could not be evaluated and were taken not to match, as far
// as Services and walks so far met them.
func (p *Program) Unknown() []string {
	var all []string
	for d := range p.unknown {
		all = append(all, d.Text)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// Strange are those of Unknown that are in kube-proxy's tables.
func (p *Program) Strange() []string { return slices.Sorted(maps.Keys(p.strange)) }

func (p *Program) walker(t *table) *walker {
	ports := t.sets["nodeport-ips"]
	return &walker{table: t, unknown: p.unknown, strange: p.strange, clients: p.cfg.Clients, local: func(a netip.Addr) bool {
		return a.IsLoopback() || slices.Contains(p.cfg.Addrs, a) || ports != nil && len(p.cfg.Addrs) == 0 && ports.contains(a.String())
	}}
}

// read finds the Services of a table.
func (p *Program) read(t *table) []*liverules.Service {
	by := map[proxy.PortName]*liverules.Service{}
	var list []*liverules.Service
	service := func(n proxy.PortName) *liverules.Service {
		s := by[n]
		if s == nil {
			s = &liverules.Service{Name: n, IP6: t.six}
			by[n] = s
			list = append(list, s)
		}
		return s
	}
	for _, name := range []string{"service-ips", "service-nodeports", "firewall-ips", "no-endpoint-services", "no-endpoint-nodeports"} {
		m := t.sets[name]
		if m == nil {
			continue
		}
		for _, key := range m.keys {
			parts := strings.Split(key, " . ")
			port, err := strconv.ParseUint(parts[len(parts)-1], 10, 16)
			value := m.values[key]
			if err != nil || len(value) == 0 || len(parts) < 2 {
				continue
			}
			proto, err := conntrack.ParseProto(parts[len(parts)-2])
			if err != nil {
				continue
			}
			f := liverules.Front{Port: uint16(port), Via: proxy.ViaNodePort}
			if len(parts) == 3 {
				if f.Addr, err = netip.ParseAddr(parts[0]); err != nil {
					continue
				}
				f.Via = proxy.ViaExternalIP
				if ips := t.sets["cluster-ips"]; ips != nil && ips.contains(parts[0]) {
					f.Via = proxy.ViaClusterIP
				}
			}
			_, n, _, ok := parseName(value[len(value)-1])
			if !ok {
				if n, ok = parseKey(m.comment[key], proto); !ok {
					continue
				}
			}
			s := service(n)
			switch name {
			case "firewall-ips":
				s.Ranges = t.ranges(value[len(value)-1])
				for i := range s.Fronts {
					if o := &s.Fronts[i]; o.Addr == f.Addr && o.Port == f.Port {
						o.Via = proxy.ViaLoadBalancer
					}
				}
				continue
			case "no-endpoint-services", "no-endpoint-nodeports":
				f.Verdict, f.Reason = proxy.Reject, "no-endpoints"
				if value[0] == "drop" {
					f.Verdict, f.Reason = proxy.Drop, "no-local-endpoints"
				}
				if i := slices.IndexFunc(s.Fronts, func(o liverules.Front) bool { return o.Addr == f.Addr && o.Port == f.Port }); i >= 0 {
					o := &s.Fronts[i] // those inside have endpoints, those outside have not
					o.Verdict, o.Reason, o.Choices, o.Missing = f.Verdict, f.Reason, nil, 0
					continue
				}
			default:
				f.Chain = value[len(value)-1]
				p.odds(t, s, &f)
			}
			s.Fronts = append(s.Fronts, f)
		}
	}
	for _, m := range t.sets {
		if kind, n, _, ok := parseName(m.name); ok && kind == "affinity" {
			if s := by[n]; s != nil {
				s.Affinity = m.timeout
			}
		}
	}
	for _, s := range list {
		slices.SortStableFunc(s.Fronts, func(a, b liverules.Front) int { return order(a.Via) - order(b.Via) })
	}
	return list
}

func order(v proxy.Via) int {
	return slices.Index([]proxy.Via{proxy.ViaClusterIP, proxy.ViaExternalIP, proxy.ViaLoadBalancer, proxy.ViaNodePort}, v)
}

// ranges are those of a firewall chain.
func (t *table) ranges(name string) (out []netip.Prefix) {
	c := t.chains[name]
	if c == nil {
		return nil
	}
	for _, r := range c.rules {
		at := slices.Index(r.words, "saddr")
		if at < 0 || len(r.words) < at+3 {
			continue
		}
		list := []string{r.words[len(r.words)-2]}
		if strings.HasPrefix(list[0], "{") {
			list = nil
			for _, e := range elements(r.words[len(r.words)-2]) {
				list = append(list, e.key)
			}
		}
		for _, one := range list {
			if a, err := netip.ParseAddr(one); err == nil {
				out = append(out, netip.PrefixFrom(a, a.BitLen()))
			} else if x, err := netip.ParsePrefix(one); err == nil {
				out = append(out, x)
			}
		}
	}
	return out
}

// odds walks the chain of a front, for a client outside.
func (p *Program) odds(t *table, s *liverules.Service, f *liverules.Front) {
	src := netip.MustParseAddrPort("198.51.100.254:1024")
	dst := netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), f.Port)
	if t.six {
		src, dst = netip.MustParseAddrPort("[2001:db8::fe]:1024"), netip.AddrPortFrom(netip.MustParseAddr("2001:db8::1"), f.Port)
	}
	if f.Addr.IsValid() {
		dst = netip.AddrPortFrom(f.Addr, f.Port)
	}
	for _, r := range p.walker(t).chain(f.Chain, way{proto: s.Name.Proto, src: src, dst: dst, chance: 1, hook: "prerouting"}) {
		if !r.picked {
			f.Missing += r.chance
			continue
		}
		if i := slices.IndexFunc(f.Choices, func(c proxy.Choice) bool { return c.Endpoint == r.dst }); i >= 0 {
			f.Choices[i].Probability += r.chance
			continue
		}
		f.Choices = append(f.Choices, proxy.Choice{Endpoint: r.dst, Probability: r.chance, Masquerade: r.masquerade})
	}
	if f.Missing < 1e-6 {
		f.Missing = 0
	}
	if len(f.Choices) > 0 {
		f.Verdict = proxy.Forward
	}
}

// Walk predicts what becomes of a first packet, as far as kube-proxy's own tables and
// the iptables beside them decide. Without Config.Clients it is that of a client
// without an affinity entry.
func (p *Program) Walk(pkt proxy.Packet) proxy.Outcome {
	var out proxy.Outcome
	i := slices.IndexFunc(p.tables, func(t *table) bool { return t.six == pkt.Dst.Addr().Is6() })
	if i < 0 {
		return out
	}
	k := p.walker(p.tables[i])
	at := []way{{proto: pkt.Proto, src: pkt.Src, dst: pkt.Dst, in: pkt.In, orig: [2]netip.AddrPort{pkt.Src, pkt.Dst}, chance: 1}}
	var done []way
	pass := func(ways []way, hook string) []way {
		for _, s := range p.stations(k.table, hook) {
			var passed []way
			for _, w := range ways {
				w.hook = hook
				for _, r := range p.station(k, &s, w, pkt.FromNode) {
					if r.then == gone {
						done = append(done, r.way)
					} else {
						passed = append(passed, r.way)
					}
				}
			}
			ways = passed
		}
		return ways
	}
	var here, there []way
	apart := func(ways []way) {
		here, there = nil, nil
		for _, w := range ways {
			if k.local(w.dst.Addr()) {
				here = append(here, w)
			} else {
				there = append(there, w)
			}
		}
	}
	if pkt.FromNode {
		apart(pass(pass(at, "output"), "postrouting"))
		for i := range here {
			here[i].in = "lo"
		}
		here = pass(pass(here, "prerouting"), "input")
	} else {
		apart(pass(at, "prerouting"))
		here, there = pass(here, "input"), pass(pass(there, "forward"), "postrouting")
	}
	p.sum(&out, slices.Concat(done, here, there), k.table, pkt)
	return out
}

// sum makes one outcome of all ways.
func (p *Program) sum(out *proxy.Outcome, ways []way, t *table, pkt proxy.Packet) {
	for i := range ways {
		w := &ways[i]
		if w.service != (proxy.PortName{}) && out.Service == (proxy.PortName{}) {
			out.Service, out.Via, out.Policy = w.service, w.via, proxy.PolicyCluster
			if w.local {
				out.Policy = proxy.PolicyLocal
			}
		}
		switch {
		case w.picked && w.refused == proxy.Pass:
			out.Verdict, out.Reason, out.Steps = proxy.Forward, "", nil
			m := w.masquerade
			if !w.masked {
				m = ""
			}
			if j := slices.IndexFunc(out.Choices, func(c proxy.Choice) bool { return c.Endpoint == w.dst }); j >= 0 {
				out.Choices[j].Probability += w.chance
				continue
			}
			out.Choices = append(out.Choices, proxy.Choice{Endpoint: w.dst, Probability: w.chance, Masquerade: m, Steps: w.steps})
		case out.Verdict == proxy.Pass:
			out.Verdict, out.Reason, out.Steps = w.refused, w.reason, w.steps
		}
	}
	if out.Verdict == proxy.Forward {
		out.Algorithm = "random"
		if len(out.Choices) == 1 {
			out.Algorithm = "single"
		}
	}
	for _, s := range p.services {
		if s.Name != out.Service || s.IP6 != t.six {
			continue
		}
		out.Affinity = s.Affinity
		for i := range s.Fronts {
			f := &s.Fronts[i]
			if out.Via == "" && f.Port == pkt.Dst.Port() && (f.Addr == pkt.Dst.Addr() || !f.Addr.IsValid()) {
				out.Via = f.Via
			}
		}
	}
}

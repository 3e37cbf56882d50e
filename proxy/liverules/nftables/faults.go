package nftables

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// FaultKind is a way in which kube-proxy's tables do not hang together.
type FaultKind uint8

// The kinds of faults.
const (
	TargetMissing   FaultKind = iota + 1 // a rule or an element leads to a chain that is not there
	ChainUnused                          // a chain of a Service has rules, and nothing leads to it
	RuleAltered                          // a rule is none that a kube-proxy writes there
	SetMissing                           // a rule asks for a set or map that is not there
	AffinityBroken                       // clients of an endpoint are not remembered, or not asked for
	HairpinStray                         // hairpin-connections has an endpoint that no rule leads to
	NodePortNowhere                      // there are node ports, and no address takes them
)

// Fault is one thing in kube-proxy's tables that is wrong whatever the API says.
type Fault struct {
	Kind FaultKind
	// Object is where: a chain, a map or a set; Rule its rule from 1, 0 for none, and
	// Text that rule or element.
	IP6    bool
	Object string
	Rule   int
	Text   string
	// To is the chain, the set or the endpoint that is meant.
	To      string
	Service proxy.PortName
}

// Faults looks at how chains, maps and sets hang together. They are in the order of
// names, IPv4 before IPv6. A chain without rules is none: kube-proxy empties a chain
// that it does not need any more, and deletes it later.
func (p *Program) Faults() []Fault {
	var all []Fault
	tables := slices.Clone(p.tables)
	slices.SortStableFunc(tables, func(a, b *table) int {
		if a.six == b.six {
			return 0
		} else if a.six {
			return 1
		}
		return -1
	})
	for _, t := range tables {
		all = append(all, p.faults(t)...)
	}
	return all
}

func (p *Program) faults(t *table) []Fault {
	var out []Fault
	add := func(k FaultKind, object string, rule int, text, to string) {
		_, n, _, _ := parseName(object)
		out = append(out, Fault{Kind: k, IP6: t.six, Object: object, Rule: rule, Text: text, To: to, Service: n})
	}
	used := map[string]bool{}
	target := func(object string, rule int, text string, verdict []string) {
		if len(verdict) < 2 || verdict[0] != "jump" && verdict[0] != "goto" {
			return
		}
		used[verdict[1]] = true
		if t.chains[verdict[1]] == nil {
			add(TargetMissing, object, rule, text, verdict[1])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.sets)) {
		s := t.sets[name]
		for _, key := range s.keys {
			target(name, 0, key+" : "+strings.Join(s.values[key], " "), s.values[key])
		}
	}
	names := slices.Sorted(maps.Keys(t.chains))
	for _, name := range names {
		for i := range t.chains[name].rules {
			r := &t.chains[name].rules[i]
			for _, v := range verdicts(r) {
				target(name, i+1, r.text, v)
			}
			for _, w := range r.words {
				if set, ok := strings.CutPrefix(w, "@"); ok && t.sets[set] == nil {
					add(SetMissing, name, i+1, r.text, set)
				}
			}
			if altered(t.chains[name], r) {
				add(RuleAltered, name, i+1, r.text, "")
			}
		}
	}
	for _, name := range names {
		if _, _, _, ok := parseName(name); ok && !used[name] && len(t.chains[name].rules) > 0 {
			add(ChainUnused, name, 0, "", "")
		}
	}
	t.remembered(names, add)
	reached := t.reached()
	if s := t.sets["hairpin-connections"]; s != nil {
		for _, key := range s.keys {
			if ep, ok := hairpin(key); !ok || !reached[ep] {
				add(HairpinStray, s.name, 0, key, ep.addr.String())
			}
		}
	}
	if s, ports := t.sets["nodeport-ips"], t.sets["service-nodeports"]; s != nil && ports != nil && len(s.keys) == 0 && len(ports.keys) > 0 {
		add(NodePortNowhere, s.name, 0, "", "")
	}
	return out
}

// verdicts are all that a rule can end with.
func verdicts(r *rule) (all [][]string) {
	for i, w := range r.words {
		switch {
		case (w == "jump" || w == "goto") && i+1 < len(r.words):
			all = append(all, r.words[i:i+2])
		case w == "vmap" && i+1 < len(r.words) && strings.HasPrefix(r.words[i+1], "{"):
			for _, e := range elements(r.words[i+1]) {
				all = append(all, e.value)
			}
		}
	}
	return all
}

// altered reports a rule that a kube-proxy does not write in such a chain: one that
// ends a packet's way by itself where only maps do, and a DNAT to another endpoint
// than the one that the chain is named for.
func altered(c *chain, r *rule) bool {
	kind, _, ep, ok := parseName(c.name)
	if ok && kind == "endpoint" && ep.IsValid() {
		if i := slices.Index(r.words, "to"); i > 0 && i+1 < len(r.words) && r.words[i+1] != ep.String() {
			return true
		}
	}
	refuses := ok && kind == "firewall" || c.name == "reject-chain" || c.name == "cluster-ips-check"
	for i, w := range r.words {
		switch w {
		case "comment":
			return false // it comes last
		case "accept", "return", "continue":
			return true
		case "drop", "reject":
			return !refuses
		case "notrack", "queue", "redirect", "snat", "tproxy":
			return i == 0 || r.words[i-1] != "status"
		}
	}
	return false
}

// remembered looks at the sets of clients with session affinity. Where one endpoint
// of a Service has one, each has: its chain puts clients in, and every chain that
// picks it by chance asks for it before.
func (t *table) remembered(names []string, add func(FaultKind, string, int, string, string)) {
	for _, name := range names {
		kind, _, _, ok := parseName(name)
		if !ok || kind != "service" && kind != "local" {
			continue
		}
		asked, picked := map[string]bool{}, []string(nil)
		with := false
		for i := range t.chains[name].rules {
			r := &t.chains[name].rules[i]
			by := slices.ContainsFunc(r.words, func(w string) bool { return strings.HasPrefix(w, "@affinity-") })
			for _, v := range verdicts(r) {
				if len(v) != 2 || !strings.HasPrefix(v[1], "endpoint-") {
					continue
				}
				if by && slices.Contains(r.words, "@affinity-"+strings.TrimPrefix(v[1], "endpoint-")) {
					asked[v[1]], with = true, true
				} else if slices.Contains(r.words, "numgen") && !slices.Contains(picked, v[1]) {
					picked = append(picked, v[1])
				}
			}
			with = with || by
		}
		for _, to := range picked {
			remembers := t.updates(to)
			if (with || remembers) && (!asked[to] || !remembers) {
				_, _, ep, _ := parseName(to)
				why := "a client that was sent there before is not asked for"
				if asked[to] {
					why = "clients that are sent there are not remembered"
				}
				add(AffinityBroken, name, 0, why, ep.String())
			}
		}
	}
}

// updates reports whether the chain of an endpoint remembers clients.
func (t *table) updates(name string) bool {
	c := t.chains[name]
	return c != nil && slices.ContainsFunc(c.rules, func(r rule) bool {
		return has(r.words, "update", "@affinity-"+strings.TrimPrefix(name, "endpoint-"))
	})
}

// served is an endpoint and the protocol it is for.
type served struct {
	proto conntrack.Proto
	addr  netip.AddrPort
}

// hairpin reads "10.1.0.2 . 10.1.0.2 . tcp . 8080".
func hairpin(key string) (served, bool) {
	parts := strings.Split(key, " . ")
	if len(parts) != 4 || parts[0] != parts[1] {
		return served{}, false
	}
	a, err1 := netip.ParseAddr(parts[0])
	proto, err2 := conntrack.ParseProto(parts[2])
	port, err3 := strconv.ParseUint(parts[3], 10, 16)
	return served{proto, netip.AddrPortFrom(a, uint16(port))}, err1 == nil && err2 == nil && err3 == nil
}

// reached are the endpoints that rules translate to.
func (t *table) reached() map[served]bool {
	out := map[served]bool{}
	for _, c := range t.chains {
		_, n, _, _ := parseName(c.name)
		for i := range c.rules {
			ws := c.rules[i].words
			at := slices.Index(ws, "to")
			if at < 1 || !slices.Contains(ws[:at], "dnat") || at+1 >= len(ws) {
				continue
			}
			if to, err := netip.ParseAddrPort(ws[at+1]); err == nil {
				out[served{n.Proto, to}] = true
				continue
			}
			for _, e := range elements(ws[len(ws)-1]) {
				if len(e.value) != 3 {
					continue
				}
				a, err1 := netip.ParseAddr(e.value[0])
				port, err2 := strconv.ParseUint(e.value[2], 10, 16)
				if err1 == nil && err2 == nil {
					out[served{n.Proto, netip.AddrPortFrom(a, uint16(port))}] = true
				}
			}
		}
	}
	return out
}

// IPTablesOfKubeProxy names the tables of iptables-nft in which a chain at a hook leads
// to a kube-proxy's of iptables mode.
func (p *Program) IPTablesOfKubeProxy() (all []string) {
	for _, t := range p.foreign {
		if t.name != "nat" || t.chains["KUBE-SERVICES"] == nil {
			continue
		}
		if slices.ContainsFunc(t.bases, func(b *chain) bool {
			return slices.ContainsFunc(b.rules, func(r rule) bool { return slices.Contains(r.words, "KUBE-SERVICES") })
		}) {
			all = append(all, t.family+" "+t.name)
		}
	}
	return all
}

// Families tells of which there is a table of kube-proxy's.
func (p *Program) Families() (four, six bool) {
	for _, t := range p.tables {
		four, six = four || !t.six, six || t.six
	}
	return four, six
}

func (p *Program) family(six bool) *table {
	for _, t := range p.tables {
		if t.six == six {
			return t
		}
	}
	return nil
}

// Has reports whether a set of kube-proxy's has an address in it, and whether there is
// such a set at all.
func (p *Program) Has(set string, a netip.Addr) (in, there bool) {
	if t := p.family(a.Is6()); t != nil && t.sets[set] != nil {
		return t.sets[set].contains(a.String()), true
	}
	return false, false
}

// HasAddress reports whether a map of kube-proxy's has an address, protocol and port in
// it, and whether there is such a map at all.
func (p *Program) HasAddress(set string, proto conntrack.Proto, a netip.AddrPort) (in, there bool) {
	t := p.family(a.Addr().Is6())
	if t == nil || t.sets[set] == nil {
		return false, false
	}
	return t.sets[set].contains(a.Addr().String() + " . " + proto.String() + " . " + strconv.Itoa(int(a.Port()))), true
}

// ClusterIPs are the addresses in the set of that name.
func (p *Program) ClusterIPs(six bool) (all []netip.Addr) {
	t := p.family(six)
	if t == nil || t.sets["cluster-ips"] == nil {
		return nil
	}
	for _, key := range t.sets["cluster-ips"].keys {
		if a, err := netip.ParseAddr(key); err == nil {
			all = append(all, a)
		}
	}
	return all
}

// Timeouts are those of a Service's sets of clients with session affinity that are in
// use, each once.
func (p *Program) Timeouts(n proxy.PortName, six bool) (all []time.Duration) {
	t := p.family(six)
	if t == nil {
		return nil
	}
	for _, s := range t.sets {
		if kind, of, _, ok := parseName(s.name); ok && kind == "affinity" && of == n && t.updates("endpoint"+strings.TrimPrefix(s.name, kind)) && !slices.Contains(all, s.timeout) {
			all = append(all, s.timeout)
		}
	}
	slices.Sort(all)
	return all
}

// NodeAddr is an address on which the rules serve node ports, if they name one.
func (p *Program) NodeAddr(six bool) (netip.Addr, bool) {
	t := p.family(six)
	if t == nil || t.sets["nodeport-ips"] == nil {
		return netip.Addr{}, false
	}
	for _, key := range t.sets["nodeport-ips"].keys {
		if x, err := netip.ParsePrefix(key); err == nil {
			return x.Addr().Next(), true
		}
		if a, err := netip.ParseAddr(key); err == nil {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// PodRanges are the ranges by which the rules tell pods from others: those whose packets
// to cluster IPs are not masqueraded, or that go a short way where a policy is Local.
func (p *Program) PodRanges() []netip.Prefix { return p.podRanges }

func (p *Program) findPodRanges() (all []netip.Prefix) {
	for _, t := range p.tables {
		for name, c := range t.chains {
			if kind, _, _, _ := parseName(name); name != "services" && kind != "external" {
				continue
			}
			for i := range c.rules {
				ws := c.rules[i].words
				at := slices.Index(ws, "saddr")
				if at < 0 || at+2 >= len(ws) || name == "services" && (ws[at+1] != "!=" || !slices.Contains(ws, "@cluster-ips")) {
					continue
				}
				if r, err := netip.ParsePrefix(ws[at+1]); name != "services" && err == nil && ws[at+2] == "goto" && !slices.Contains(all, r) {
					all = append(all, r)
				}
				if r, err := netip.ParsePrefix(ws[at+2]); name == "services" && err == nil && !slices.Contains(all, r) {
					all = append(all, r)
				}
			}
		}
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	return all
}

// Assuming is the Program of a node with other addresses.
func (p *Program) Assuming(addrs []netip.Addr) *Program {
	x := *p
	x.cfg.Addrs = addrs
	return &x
}

// Look is Walk, and the rules that it met and could not evaluate.
func (p *Program) Look(pkt proxy.Packet) (o proxy.Outcome, unknown []Doubt) {
	before := p.unknown
	p.unknown = map[Doubt]bool{}
	o = p.Walk(pkt)
	for d := range p.unknown {
		unknown = append(unknown, d)
		before[d] = true
	}
	p.unknown = before
	return o, unknown
}

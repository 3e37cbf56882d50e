package userspace

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// program is what one Snapshot and Overlay ask for, in both families.
type program struct {
	cfg      *Config
	node     proxy.Node
	units    []*unit
	claims   [2]map[proxy.Claim]proxy.Owner // by family
	owners   [2][]*unit
	problems []proxy.Problem
	index    proxy.Index
	jumps    map[xtables.Family][]jumpRule
	six      bool // IPv6 is programmed
	render   *renderer
}

// jumpRule leads from a built-in chain to one of ours.
type jumpRule struct {
	chainKey
	text string
	// last stands at the end of its chain, others at the head.
	last bool
	to   string
}

// renderer renders for one Config and Node.
type renderer struct {
	cfg   *Config
	node  proxy.Node
	addrs []netip.Addr // of the node, nil if unknown
}

// local returns the detector of a family.
func (r *renderer) local(f xtables.Family) proxy.Detector {
	return r.cfg.Detect.For(&r.node, f == xtables.IPv6)
}

// target is the node's address to which packets from other machines and pods
// are led: the Node's own where an interface has it, else none, for REDIRECT.
// REDIRECT takes an address of the interface by which a packet came, and drops
// the packet where that has none, as with some network plugins.
func (r *renderer) target(f xtables.Family) netip.Addr {
	for _, a := range r.node.Addrs {
		if familyOf(a) == f && slices.Contains(r.addrs, a) {
			return a
		}
	}
	return netip.Addr{}
}

// Render says what should be in the kernel and in this process. The same input
// gives the same output, but for the node's addresses, which it looks up.
func (b *Backend) Render(s *proxy.Snapshot, o proxy.Overlay) proxy.Program {
	r := &renderer{cfg: &b.cfg, node: s.Node}
	if f := b.cfg.NodePorts.LocalAddrs; f != nil {
		r.addrs = f()
	}
	p := &program{cfg: &b.cfg, node: s.Node, six: !b.noIPv6.Load(), index: make(proxy.Index), render: r,
		jumps: map[xtables.Family][]jumpRule{xtables.IPv4: r.jumps(xtables.IPv4), xtables.IPv6: r.jumps(xtables.IPv6)}}
	checks := [2]proxy.Checker{{}, {IP6: true}}
	for i := range s.Services {
		f := familyOf(s.Services[i].ClusterIP)
		if f == xtables.IPv6 && !p.six {
			continue
		}
		svc, ok := checks[f].Service(&s.Services[i])
		if !ok {
			continue
		}
		u := &unit{svc: svc, family: f}
		p.owners[f] = append(p.owners[f], u)
		if p.unfit(u) {
			continue
		}
		u.sel = u.svc.Select(s.Node, o)
		r.unit(u)
		for _, t := range u.tagged {
			if err := p.index.Add(t); err != nil {
				panic(err) // tags are made of hashes
			}
		}
		p.units = append(p.units, u)
	}
	for f := range checks {
		p.claims[f] = checks[f].Claims
		p.problems = append(p.problems, checks[f].Problems...)
	}
	return p
}

// unfit reports what only this mode cannot serve, and leaves out endpoints that
// lead back to the Service.
func (p *program) unfit(u *unit) bool {
	problem := func(field, format string, args ...any) {
		n := u.svc.Name
		p.problems = append(p.problems, proxy.Problem{
			Object: "Service " + n.Namespace + "/" + n.Name, Field: field, Message: fmt.Sprintf(format, args...),
		})
	}
	if proto := u.svc.Name.Proto; proto != conntrack.TCP && proto != conntrack.UDP {
		problem("spec.ports", "protocol %s is not served by the userspace mode: use TCP or UDP, or another mode", proto)
		return true
	}
	self := netip.AddrPortFrom(u.svc.ClusterIP, u.svc.Port)
	if slices.ContainsFunc(u.svc.Endpoints, func(e proxy.Endpoint) bool { return e.Addr == self }) {
		problem("endpoints", "%s is the Service itself; the endpoint is left out", self)
		u.svc.Endpoints = slices.DeleteFunc(slices.Clone(u.svc.Endpoints), func(e proxy.Endpoint) bool { return e.Addr == self })
	}
	return false
}

func familyOf(a netip.Addr) xtables.Family {
	if a.Is6() && !a.Is4In6() {
		return xtables.IPv6
	}
	return xtables.IPv4
}

// The comments of jumps, all but the first as kube-proxy had them.
const (
	aboutRefuse    = "kubernetes services that lead nowhere"
	aboutNonLocal  = "Ensure that non-local NodePort traffic can flow"
	aboutPortals   = "handle ClusterIPs; NOTE: this must be before the NodePort rules"
	aboutNodePorts = "handle service NodePorts; NOTE: this must be the last rule in the chain"
)

// jumps are the ways from the kernel's chains to ours.
func (r *renderer) jumps(f xtables.Family) []jumpRule {
	var out []jumpRule
	add := func(table, to, text string, last bool, chains ...string) {
		for _, c := range chains {
			out = append(out, jumpRule{chainKey{table, c}, text + " -j " + to, last, to})
		}
	}
	fresh := "-m conntrack --ctstate NEW"
	add("filter", chainRefuse, line(fresh, comment(aboutRefuse)), false, "INPUT", "FORWARD", "OUTPUT")
	add("filter", chainNonLocal, comment(aboutNonLocal), false, "INPUT")
	add("nat", chainContainer, comment(aboutPortals), false, "PREROUTING")
	add("nat", chainHost, comment(aboutPortals), false, "OUTPUT")
	for _, match := range r.nodePorts(f) {
		text := line(match.dst, comment(aboutNodePorts), match.local)
		add("nat", chainNodePortContainer, text, true, "PREROUTING")
		add("nat", chainNodePortHost, text, true, "OUTPUT")
	}
	return out
}

// nodePortMatch matches addresses that serve node ports.
type nodePortMatch struct{ dst, local string }

func (r *renderer) nodePorts(f xtables.Family) []nodePortMatch {
	six := f == xtables.IPv6
	localhost := r.cfg.LocalhostNodePorts && !six
	if len(r.cfg.NodePorts.Limits(&r.node, six)) == 0 {
		m := nodePortMatch{local: "-m addrtype --dst-type LOCAL"}
		switch {
		case six:
			m.dst = "! -d ::1/128"
		case !localhost:
			m.dst = "! -d 127.0.0.0/8"
		}
		return []nodePortMatch{m}
	}
	var out []nodePortMatch
	for _, a := range r.cfg.NodePorts.Addrs(&r.node, six, localhost) {
		out = append(out, nodePortMatch{dst: to(a)})
	}
	return out
}

// Index lists the tagged rules, and what stands for endpoints in this process.
func (p *program) Index() proxy.Index { return p.index }

// Problems lists what could not be rendered.
func (p *program) Problems() []proxy.Problem { return p.problems }

// examplePort is the first port in Text, where the real ones are not known.
const examplePort = 40000

// Text returns the program as iptables-restore --noflush takes it. Ports are
// only known once the process listens, so those in it are examples.
func (p *program) Text() string {
	var b bytes.Buffer
	first := uint16(examplePort)
	if p.cfg.Ports.Size() > 0 {
		first = p.cfg.Ports.First
	}
	b.WriteString("# The proxy's own ports are chosen when it starts: those from " + p.portText(first) + " on stand for them.\n")
	for _, f := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		if f == xtables.IPv6 {
			if !slices.ContainsFunc(p.units, func(u *unit) bool { return u.family == f }) {
				continue
			}
			b.WriteString("# ip6tables-restore\n")
		}
		for _, table := range []string{"filter", "nat"} {
			p.writeTable(&b, f, table, first)
		}
	}
	return b.String()
}

func (p *program) portText(n uint16) string { return (&rule{port: true}).line(n) }

func (p *program) writeTable(b *bytes.Buffer, f xtables.Family, table string, first uint16) {
	b.WriteString("*" + table + "\n")
	for _, k := range chains() {
		if k.table == table {
			b.WriteString(":" + k.chain + " - [0:0]\n")
		}
	}
	for _, k := range chains() {
		if k.table != table {
			continue
		}
		port := first
		for _, u := range p.units {
			for i := range u.rules {
				if r := &u.rules[i]; u.family == f && r.chainKey == k {
					b.WriteString("-A " + k.chain + " " + r.line(port) + "\n")
				}
			}
			if u.served {
				port++
			}
		}
	}
	for _, j := range p.jumps[f] {
		if j.table == table {
			b.WriteString(j.insert() + "\n")
		}
	}
	b.WriteString("COMMIT\n")
}

func (j *jumpRule) insert() string {
	if j.last {
		return "-A " + j.chain + " " + j.text
	}
	return "-I " + j.chain + " " + j.text
}

// RuleCounts counts the rules of each table.
func (p *program) RuleCounts() map[proxy.Table]int {
	n := map[proxy.Table]int{}
	for _, f := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		if f == xtables.IPv6 && !p.six {
			continue
		}
		for _, table := range []string{"filter", "nat"} {
			n[proxy.Table{IP6: f == xtables.IPv6, Name: table}] = 0
		}
		for i := range p.jumps[f] {
			n[proxy.Table{IP6: f == xtables.IPv6, Name: p.jumps[f][i].table}]++
		}
	}
	for _, u := range p.units {
		for i := range u.rules {
			n[proxy.Table{IP6: u.family == xtables.IPv6, Name: u.rules[i].table}]++
		}
	}
	return n
}

// ourJump reports whether a rule in a built-in chain is a jump of ours: it leads
// to a chain of ours and says what we say.
func ourJump(table string, r *xtables.Rule) bool {
	switch r.Comment() {
	case aboutRefuse, aboutNonLocal, aboutPortals, aboutNodePorts:
		return owned(table, r.Target)
	}
	return false
}

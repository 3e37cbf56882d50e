package check

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/proxy/liverules/nftables"
)

const syncAgain = "restart kube-proxy, or wait for its next full sync"

// nftMode reports whether there is a table of a kube-proxy in nftables mode.
func (c *checker) nftMode() bool {
	return c.NFT != nil && c.NFT.Mode() != "" || slices.ContainsFunc(c.NFTables, func(t string) bool { return strings.HasSuffix(t, " kube-proxy") })
}

// tablesOfNFT looks at the tables of a kube-proxy in nftables mode by themselves.
func (c *checker) tablesOfNFT() {
	if c.NFT == nil {
		return
	}
	if c.NFT.Mode() == "" {
		if c.Dumps == nil && c.Snapshot != nil && len(c.Snapshot.Services) > 0 {
			c.add("nothing", c.Node, "does kube-proxy run here? Does something else handle Services, such as Cilium or Calico's eBPF?",
				"the API has %d Services, and nf_tables has no table of a kube-proxy", len(c.Snapshot.Services))
		}
		return
	}
	if c.Dumps == nil {
		for _, table := range c.NFT.IPTablesOfKubeProxy() {
			c.once("two-proxies", "nftables", "stop one of them; kube-proxy --cleanup removes what it left",
				"there is a table kube-proxy, and %s has live rules of a kube-proxy in iptables mode: two proxies, or two modes of one after the other", table)
		}
	}
	for _, f := range c.NFT.Faults() {
		c.fault(&f)
	}
	w := nftWays{checker: c, program: c.NFT}
	assumed := c.NFT.Assuming([]netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")})
	for _, s := range c.NFT.Services() {
		c.odds(s)
		for i := range s.Fronts {
			w.front(s, &s.Fronts[i], assumed)
		}
	}
	if strange := c.NFT.Strange(); len(strange) > 0 {
		c.add("rule-altered", "kube-proxy", syncAgain, "%d rules in its tables could not be evaluated, and are taken not to match: no kube-proxy that is known writes them", len(strange)).Evidence = first(strange, 3)
	}
}

// fault says what does not hang together.
func (c *checker) fault(f *nftables.Fault) {
	object, where := "kube-proxy/"+f.Object, ""
	if f.IP6 {
		where = " (IPv6)"
	}
	var g *Finding
	switch f.Kind {
	case nftables.TargetMissing:
		g = c.add("target-missing", object, syncAgain, "it leads to the chain %s, which is not there%s", f.To, where)
	case nftables.SetMissing:
		g = c.add("target-missing", object, syncAgain, "rule %d asks for %s, which is not there%s", f.Rule, f.To, where)
	case nftables.ChainUnused:
		g = c.add("chain-unused", object, "", "nothing leads to it%s: its Service changed, or an element or a rule was deleted", where)
	case nftables.RuleAltered:
		g = c.add("rule-altered", object, syncAgain, "rule %d is none that a kube-proxy writes there%s", f.Rule, where)
	case nftables.AffinityBroken:
		g = c.once("affinity-wrong", f.Service.String(), syncAgain, "session affinity does not hold for %s%s: %s", f.To, where, f.Text)
		if g != nil {
			g.Evidence = []string{object}
		}
		return
	case nftables.HairpinStray:
		g = c.add("element-extra", object, syncAgain, "%s is in it, and no rule leads to that endpoint%s", f.To, where)
		g.Severity = Note // it makes no difference to anybody
	case nftables.NodePortNowhere:
		g = c.add("element-missing", object, "see kube-proxy's --nodeport-addresses", "it is empty, so that node ports lead nowhere%s", where)
	default:
		return
	}
	if f.Text != "" {
		g.Evidence = []string{f.Text}
	}
}

// nftWays sends packets to the addresses of Services.
type nftWays struct {
	*checker
	program *nftables.Program
	// refusesPorts says that ports that a cluster IP does not have were looked at.
	refusesPorts bool
}

// front sends packets of clients to an address, each of which must come to what the
// maps have for it.
func (c *nftWays) front(s *liverules.Service, f *liverules.Front, assumed *nftables.Program) {
	outside, pod, self := netip.MustParseAddr("198.51.100.254"), netip.Addr{}, netip.MustParseAddr("192.0.2.1")
	if s.IP6 {
		outside, self = netip.MustParseAddr("2001:db8::fe"), netip.MustParseAddr("2001:db8::1")
	}
	program := c.program
	if i := slices.IndexFunc(c.Addrs, func(a netip.Addr) bool { return a.Is6() == s.IP6 && !a.IsLoopback() && !a.IsLinkLocalUnicast() }); i >= 0 {
		self = c.Addrs[i]
	}
	for _, r := range c.program.PodRanges() {
		if r.Addr().Is6() == s.IP6 {
			pod = r.Masked().Addr().Next()
		}
	}
	dst := f.Addr
	if !dst.IsValid() {
		served, ok := c.program.NodeAddr(s.IP6)
		in, there := c.program.Has("nodeport-ips", self)
		switch {
		case ok && !(there && in): // the node's, of which these are some
			dst = served
			program = c.program.Assuming([]netip.Addr{served, self})
		case there && !ok:
			return // said already
		default:
			dst, program = self, assumed
			if self != netip.MustParseAddr("192.0.2.1") && self != netip.MustParseAddr("2001:db8::1") {
				program = c.program
			}
		}
	}
	packet := func(src netip.Addr, fromNode bool) proxy.Packet {
		return proxy.Packet{Proto: s.Name.Proto, Src: netip.AddrPortFrom(src, 40000), Dst: netip.AddrPortFrom(dst, f.Port), FromNode: fromNode}
	}
	if len(s.Ranges) > 0 && f.Via == proxy.ViaLoadBalancer {
		outside = s.Ranges[0].Addr()
	}
	if f.Verdict == proxy.Reject || f.Verdict == proxy.Drop {
		refused := func(p *nftables.Program, pkt proxy.Packet) bool {
			o, _ := p.Look(pkt)
			return o.Verdict == proxy.Reject || o.Verdict == proxy.Drop
		}
		if !refused(program, packet(outside, false)) {
			c.entry("filter", s, f, "clients outside are not refused at")
		}
		if f.Chain != "" { // the node itself and pods have a short way
			o, _ := program.Look(packet(self, true))
			c.masqueraded(s, f, &o, "packets of the node itself")
		}
		if f.Chain == "" && f.Addr.IsValid() {
			if !refused(program, packet(self, true)) {
				c.entry("filter-output", s, f, "what the node itself sends is not refused at")
			}
			if !refused(c.program.Assuming([]netip.Addr{f.Addr}), packet(outside, false)) {
				c.entry("filter-input", s, f, "clients outside are not refused at, should the node have the address,")
			}
		}
		return
	}
	if f.Verdict != proxy.Forward || f.Missing > 0 {
		return // said by the odds
	}
	o, unknown := program.Look(packet(outside, false))
	c.arrives(s, f, &o, unknown, "prerouting", "packets of clients outside do not get to")
	if f.Via != proxy.ViaClusterIP || pod.IsValid() {
		c.masqueraded(s, f, &o, "packets of clients outside")
	}
	if pod.IsValid() && f.Via == proxy.ViaClusterIP {
		o, unknown = program.Look(packet(pod, false))
		c.arrives(s, f, &o, unknown, "prerouting", "packets of pods do not get to")
	}
	if f.Via == proxy.ViaClusterIP || len(s.Ranges) == 0 {
		o, unknown = program.Look(packet(self, true))
		c.arrives(s, f, &o, unknown, "output", "packets that the node itself sends do not get to")
		if f.Via != proxy.ViaClusterIP {
			c.masqueraded(s, f, &o, "packets of the node itself")
		}
	}
	if f.Via == proxy.ViaClusterIP && pod.IsValid() {
		c.otherPorts(s, f, pod, self)
	}
}

// masqueraded wants a packet that goes to any endpoint to get a source of the node.
func (c *nftWays) masqueraded(s *liverules.Service, f *liverules.Front, o *proxy.Outcome, whose string) {
	if o.Verdict != proxy.Forward || o.Policy != proxy.PolicyCluster || o.Service != s.Name {
		return
	}
	if i := slices.IndexFunc(o.Choices, func(x proxy.Choice) bool { return x.Masquerade == "" }); i >= 0 {
		g := c.once("masquerade-missing", s.Name.String(), syncAgain,
			"%s to %s by %s keep their source on the way to %s: where that is on another node, answers do not come back this way", whose, f, f.Via, o.Choices[i].Endpoint)
		if g != nil && f.Via == proxy.ViaClusterIP {
			g.Severity = Risk // few send to cluster IPs from outside
		}
	}
}

// otherPorts wants a port that a cluster IP does not have to be refused.
func (c *nftWays) otherPorts(s *liverules.Service, f *liverules.Front, pod, self netip.Addr) {
	if c.refusesPorts {
		return // one Service tells of all
	}
	c.refusesPorts = true
	port := uint16(1)
	for slices.ContainsFunc(c.program.Services(), func(x *liverules.Service) bool {
		return slices.ContainsFunc(x.Fronts, func(y liverules.Front) bool { return y.Addr == f.Addr && y.Port == port })
	}) {
		port++
	}
	for _, from := range []struct {
		pkt   proxy.Packet
		chain string
	}{{proxy.Packet{Src: netip.AddrPortFrom(pod, 40000)}, "filter-forward"}, {proxy.Packet{Src: netip.AddrPortFrom(self, 40000), FromNode: true}, "filter-output"}} {
		from.pkt.Proto, from.pkt.Dst = s.Name.Proto, netip.AddrPortFrom(f.Addr, port)
		if o, _ := c.program.Look(from.pkt); o.Verdict == proxy.Pass || o.Verdict == proxy.Drop && o.Steps[len(o.Steps)-1].Table == ofKubeProxy {
			g := c.once("rule-altered", "kube-proxy/"+from.chain, syncAgain, "ports that a cluster IP does not have are not refused: clients of %s get no answer", from.pkt.Dst)
			if g != nil {
				g.Severity = Note
			}
		}
	}
}

func (c *nftWays) entry(object string, s *liverules.Service, f *liverules.Front, what string) {
	if s.IP6 {
		object += " (IPv6)"
	}
	c.once("entry-missing", "kube-proxy/"+object, syncAgain, "%s %s (%s) and perhaps others: no rule at this hook leads there", what, f, s.Name)
}

// arrives says what becomes of a packet that should come to an endpoint.
func (c *nftWays) arrives(s *liverules.Service, f *liverules.Front, o *proxy.Outcome, unknown []nftables.Doubt, hook, what string) {
	switch o.Verdict {
	case proxy.Forward:
		if o.Service != s.Name && len(o.Choices) > 0 && c.taken(s, f, o) {
			return
		}
		sum := 0.0
		for _, x := range o.Choices {
			sum += x.Probability
		}
		if sum < 1-1e-6 && len(unknown) == 0 {
			c.once("forward-dropped", s.Name.String(), "kptrace explain tells for one client", "%.1f %% of connections to %s do not get to an endpoint that was picked for them", 100*(1-sum), f)
		}
	case proxy.Drop, proxy.Reject:
		var last proxy.Step
		if n := len(o.Steps); n > 0 {
			last = o.Steps[n-1]
		}
		// What was met elsewhere makes no difference to it, unless it changes marks.
		unknown = slices.DeleteFunc(unknown, func(d nftables.Doubt) bool {
			return (d.Hook != last.Hook || d.Table != last.Table) && !strings.Contains(d.Text, "mark")
		})
		where, owner, text := last.Table+"/"+last.Chain, ownerOf(&last), last.Text
		if owner == "" && last.Rule == 0 {
			owner = c.policyOwner(last.Chain, s.IP6)
		}
		var g *Finding
		switch {
		case len(unknown) > 0 && last.Rule == 0:
			g = c.once("forward-policy", where, "kptrace explain tells for one client", "its policy is DROP, and whether a rule accepts packets to endpoints depends on what could not be evaluated")
		case len(unknown) > 0:
			g = c.once("foreign-drop", where, "kptrace explain tells for one client", "rule %d%s can drop packets to endpoints of Services", last.Rule, of(owner))
		case last.Rule == 0:
			g = c.once("forward-dropped", where, "let service traffic pass, by the policy or by a rule that accepts the pod network",
				"the policy of %s%s drops packets on their way to endpoints of %s and others", where, of(owner), s.Name)
		default:
			g = c.once("forward-dropped", s.Name.String(), "", "rule %d of %s%s drops packets to %s", last.Rule, where, of(owner), f)
		}
		if g != nil {
			if g.Owner = owner; text != "" {
				g.Evidence = []string{text}
			}
		}
	case proxy.Pass:
		if i := slices.IndexFunc(o.Steps, func(x proxy.Step) bool { return x.Effect == "notrack" }); i >= 0 {
			x := &o.Steps[i]
			owner := ownerOf(x)
			g := c.once("not-tracked", s.Name.String(), "if a program on the node answers at this address itself, as NodeLocal DNSCache does, this is intended: --ignore not-tracked:"+s.Name.String(),
				"rule %d of %s/%s%s keeps %s from connection tracking, so that no endpoint is picked", x.Rule, x.Table, x.Chain, of(owner), f)
			if g != nil {
				g.Owner, g.Evidence = owner, []string{x.Text}
				if owner == "NodeLocal DNSCache" {
					g.Severity = Note
				}
			}
			return
		}
		c.entry(hook, s, f, what)
	}
}

// taken says that a rule of somebody else's translates a packet before.
func (c *nftWays) taken(s *liverules.Service, f *liverules.Front, o *proxy.Outcome) bool {
	steps := o.Choices[0].Steps
	i := slices.IndexFunc(steps, func(x proxy.Step) bool {
		return (x.Effect == "dnat" || x.Effect == "redirect") && x.Table != ofKubeProxy
	})
	if i < 0 {
		return false
	}
	x := &steps[i]
	owner := ownerOf(x)
	g := c.once("nodeport-shadowed", s.Name.String(), "give the Service or the other program another port",
		"%s by %s is taken by rule %d of %s/%s%s, which sends it to %s", f, f.Via, x.Rule, x.Table, x.Chain, of(owner), o.Choices[0].Endpoint)
	if g != nil {
		g.Owner, g.Evidence = owner, []string{x.Text}
	}
	return true
}

// ofKubeProxy is the name of the tables of a kube-proxy in nftables mode.
const ofKubeProxy = "kube-proxy"

// ownerOf tells whose a rule of iptables or nftables is, empty where nobody can tell.
func ownerOf(x *proxy.Step) string {
	if o := liverules.TableOwner(x.Table); o != "" {
		return o
	}
	if x.Rule > 0 && slices.Contains([]string{"raw", "mangle", "nat", "filter", "security"}, x.Table) { // of iptables
		rs, err := xtables.Parse(xtables.IPv4, "*"+x.Table+"\n-A "+x.Chain+" "+x.Text+"\nCOMMIT\n")
		if err == nil {
			if c := rs.Chain(x.Table, x.Chain); c != nil && len(c.Rules) == 1 {
				return liverules.Owner(x.Table, x.Chain, c.Rules[0])
			}
		}
	}
	return liverules.Owner(x.Table, x.Chain, nil)
}

// wantedOfNFT holds what only nftables mode has against the API.
func (c *checker) wantedOfNFT(svc *proxy.Service, live *liverules.Service) {
	name := svc.Name.String()
	if in, there := c.NFT.Has("cluster-ips", svc.ClusterIP); there && !in {
		c.add("element-missing", "kube-proxy/cluster-ips", syncAgain, "the cluster IP %s of %s is not in it: clients outside are not masqueraded, and other ports are not refused", svc.ClusterIP, svc.Name)
	}
	if live == nil {
		return
	}
	sel := svc.Select(c.Snapshot.Node, c.Overlay)
	wanted := fronts(svc, &sel)
	for i := range live.Fronts {
		f := &live.Fronts[i]
		if !slices.ContainsFunc(wanted, func(w front) bool {
			return w.addr == f.Addr && w.port == f.Port && (w.via == proxy.ViaNodePort) == (f.Via == proxy.ViaNodePort)
		}) {
			c.add("service-extra", name, syncAgain, "the API does not have it at %s, and the rules serve it there", f)
		}
	}
	for i := range wanted {
		w := &wanted[i]
		if w.via == proxy.ViaClusterIP || !w.addr.IsValid() || len(sel.Cluster) == 0 {
			continue
		}
		at := netip.AddrPortFrom(w.addr, w.port)
		if in, there := c.NFT.HasAddress("service-ips", svc.Name.Proto, at); there && !in && len(w.want) == 0 {
			c.once("element-missing", name, syncAgain, "%s is not in service-ips: pods and the node do not get its endpoints there", at)
		}
	}
	if slices.ContainsFunc(live.Fronts, func(f liverules.Front) bool { return len(f.Choices) > 0 }) {
		c.affinity(svc)
	}
	c.hairpins(svc, live)
	for _, a := range svc.LoadBalancerIPs {
		c.ranges(svc, live, a)
		at := netip.AddrPortFrom(a, svc.Port)
		if in, there := c.NFT.HasAddress("firewall-ips", svc.Name.Proto, at); len(svc.SourceRanges) > 0 && there && !in && !everybody(svc.SourceRanges) {
			c.once("element-missing", name, syncAgain, "%s is not in firewall-ips, so that its source ranges are not looked at", at)
		}
	}
}

func (c *checker) affinity(svc *proxy.Service) {
	have := c.NFT.Timeouts(svc.Name, svc.Is6())
	switch {
	case svc.Affinity == 0 && len(have) > 0:
		c.once("affinity-wrong", svc.Name.String(), syncAgain, "the rules keep clients with an endpoint for %v, and the Service asks for no session affinity", have[0])
	case svc.Affinity > 0 && len(have) == 0:
		c.once("affinity-wrong", svc.Name.String(), syncAgain, "the Service asks for session affinity of %v, and the rules have none", svc.Affinity)
	case svc.Affinity > 0 && !slices.Equal(have, []time.Duration{svc.Affinity}):
		c.once("affinity-wrong", svc.Name.String(), syncAgain, "the Service asks for session affinity of %v, and the rules have %v", svc.Affinity, have)
	}
}

// hairpins has each endpoint on this node send to its own Service.
func (c *checker) hairpins(svc *proxy.Service, live *liverules.Service) {
	i := slices.IndexFunc(live.Fronts, func(f liverules.Front) bool {
		return f.Via == proxy.ViaClusterIP && f.Addr == svc.ClusterIP && f.Verdict == proxy.Forward
	})
	if i < 0 {
		return
	}
	for _, e := range svc.Endpoints {
		if !e.Local || !slices.ContainsFunc(live.Fronts[i].Choices, func(x proxy.Choice) bool { return x.Endpoint == e.Addr }) {
			continue
		}
		o, _ := c.NFT.Look(proxy.Packet{Proto: svc.Name.Proto, Src: netip.AddrPortFrom(e.Addr.Addr(), 40000), Dst: netip.AddrPortFrom(svc.ClusterIP, svc.Port)})
		if x, ok := o.Find(e.Addr); ok && x.Masquerade == "" {
			c.once("masquerade-missing", svc.Name.String(), syncAgain, "%s gets no answer where it reaches itself by %s: its packets are not masqueraded", e.Addr, netip.AddrPortFrom(svc.ClusterIP, svc.Port))
		}
	}
}

// ranges sends packets from the edges of the source ranges that the Service has, and
// of those in the rules.
func (c *checker) ranges(svc *proxy.Service, live *liverules.Service, dst netip.Addr) {
	i := slices.IndexFunc(live.Fronts, func(f liverules.Front) bool { return f.Addr == dst && f.Port == svc.Port })
	if i < 0 {
		return
	}
	if live.Fronts[i].Verdict != proxy.Forward { // nobody gets in: what will be when there are endpoints
		for _, r := range svc.SourceRanges {
			in := func(a netip.Addr) bool {
				return slices.ContainsFunc(live.Ranges, func(x netip.Prefix) bool { return x.Contains(a) })
			}
			if r.Addr().Is6() == svc.Is6() && !everybody(svc.SourceRanges) && !(in(r.Masked().Addr()) && in(lastOf(r))) {
				c.once("ranges-wrong", svc.Name.String(), syncAgain, "the Service lets in %s, and its rules do not say so", r).Severity = Risk
				return
			}
		}
		return
	}
	var self []netip.Addr
	for _, a := range c.Addrs {
		if a.Is6() == svc.Is6() && !a.IsLoopback() && !a.IsLinkLocalUnicast() && !slices.Contains(svc.LoadBalancerIPs, a) {
			self = append(self, a)
			break
		}
	}
	var edges []netip.Addr
	for _, r := range slices.Concat(svc.SourceRanges, live.Ranges) {
		first, last := r.Masked().Addr(), lastOf(r)
		edges = append(edges, first, last, first.Prev(), last.Next())
	}
	for i, src := range slices.Concat(self, edges) {
		node := i < len(self)
		if !src.IsValid() || src.Is6() != svc.Is6() || slices.Contains(svc.LoadBalancerIPs, src) || !node && slices.Contains(c.Addrs, src) {
			continue // the node's own are let in by the address that they dial, too
		}
		want := len(svc.SourceRanges) == 0 || slices.ContainsFunc(svc.SourceRanges, func(r netip.Prefix) bool { return r.Contains(src) })
		o, _ := c.NFT.Look(proxy.Packet{Proto: svc.Name.Proto, Src: netip.AddrPortFrom(src, 40000), Dst: netip.AddrPortFrom(dst, svc.Port), FromNode: node})
		refused := o.Reason == "source-range"
		switch {
		case want && refused:
			c.once("ranges-wrong", svc.Name.String(), syncAgain, "the rules refuse %s at %s:%d, which the Service's source ranges let in", src, dst, svc.Port)
			return
		case !want && !refused:
			f := c.once("ranges-wrong", svc.Name.String(), syncAgain, "the rules let %s in at %s:%d, which is outside the Service's source ranges", src, dst, svc.Port)
			if f != nil {
				f.Severity = Risk
			}
			return
		}
	}
}

// everybody reports whether source ranges leave out nobody: kube-proxy writes none then.
func everybody(ranges []netip.Prefix) bool {
	return slices.ContainsFunc(ranges, func(r netip.Prefix) bool { return r.Bits() == 0 })
}

// lastOf is the last address of a range.
func lastOf(r netip.Prefix) netip.Addr {
	b := r.Masked().Addr().AsSlice()
	for bit := r.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 1 << (7 - bit%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// strayClusterIPs looks for those of no Service.
func (c *checker) strayClusterIPs() {
	known := map[netip.Addr]bool{}
	for i := range c.Snapshot.Services {
		known[c.Snapshot.Services[i].ClusterIP] = true
	}
	for _, six := range []bool{false, true} {
		for _, a := range c.NFT.ClusterIPs(six) {
			if !known[a] {
				c.add("element-extra", "kube-proxy/cluster-ips", syncAgain, "%s is in it, and is no cluster IP of a Service", a)
			}
		}
	}
}

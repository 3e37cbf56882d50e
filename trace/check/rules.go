package check

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
)

// rulesets looks at the rules by themselves.
func (c *checker) rulesets() {
	if c.Dumps == nil {
		return
	}
	for _, family := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		c.flavours(family)
	}
	var rulesets []*xtables.Ruleset
	for _, d := range c.picked {
		rulesets = append(rulesets, d.Rules)
	}
	c.live = liverules.New(liverules.Config{Addrs: c.Addrs, Snapshot: c.Snapshot, Overlay: c.Overlay}, rulesets...)
	c.proxies()
	for _, d := range c.picked {
		if len(xtables.LiveKube(d.Rules)) > 0 || d.Rules.Chain("nat", "KUBE-SERVICES") != nil {
			c.structure(d)
		}
	}
	if c.live.Mode() != proxy.IPTables {
		return
	}
	for _, s := range c.live.Services() {
		c.odds(s)
		for i := range s.Fronts {
			c.way(s, &s.Fronts[i])
		}
	}
}

// flavours picks the rules that serve, of two flavours.
func (c *checker) flavours(family xtables.Family) {
	var with, any []*xtables.Dump
	for i := range c.Dumps {
		d := &c.Dumps[i]
		if d.Family != family {
			continue
		}
		if d.Rules.Rules() > 0 {
			any = append(any, d)
		}
		if len(xtables.LiveKube(d.Rules)) > 0 {
			with = append(with, d)
		}
	}
	switch {
	case len(with) > 1:
		f := c.add("both-flavours", family.String(), "find out which proxy runs, and remove the other one's rules: kptrace cleanup --iptables-flavour, or the tools of that flavour",
			"iptables-%v and iptables-%v both have live rules of a kube-proxy: a packet is sent by whichever comes first, with the state that this one has", with[0].Flavour, with[1].Flavour)
		for _, d := range with {
			f.Evidence = append(f.Evidence, fmt.Sprintf("%v: %s", d.Flavour, strings.Join(first(xtables.LiveKube(d.Rules), 3), ", ")))
		}
	case len(any) > 1:
		c.add("both-flavours-used", family.String(), "", "iptables-%v has %d rules and iptables-%v %d: what either drops is dropped",
			any[0].Flavour, any[0].Rules.Rules(), any[1].Flavour, any[1].Rules.Rules())
	}
	switch {
	case len(with) > 0:
		c.picked = append(c.picked, with[0])
	case len(any) > 0:
		c.picked = append(c.picked, any[0])
	}
}

func first(list []string, n int) []string {
	if len(list) > n {
		return append(slices.Clone(list[:n]), "…")
	}
	return list
}

// proxies looks for a second proxy, and for what another mode left.
func (c *checker) proxies() {
	mode := c.live.Mode()
	nft, left := c.nftMode(), []string(nil)
	switch {
	case nft && mode != "" && !slices.ContainsFunc(c.picked, func(d *xtables.Dump) bool { return len(xtables.LiveKube(d.Rules)) > 0 }):
		left = append(left, "chains of a kube-proxy in iptables, to which nothing leads")
	case nft && mode != "":
		c.add("two-proxies", "nftables", "stop one of them; kube-proxy --cleanup removes what it left",
			"there is a table kube-proxy in nf_tables and there are rules of a kube-proxy in iptables: two proxies, or two modes of one after the other")
	case (mode == proxy.IPTables || nft) && c.VirtualServers > 0:
		if nft {
			mode = proxy.NFTables
		}
		c.add("two-proxies", "ipvs", "stop one of them; kube-proxy --cleanup or ipvsadm --clear removes what IPVS has",
			"IPVS has %d virtual servers, and there are rules of a kube-proxy in %s mode", c.VirtualServers, mode)
	case mode == "" && !nft && c.VirtualServers == 0 && c.Snapshot != nil && len(c.Snapshot.Services) > 0 && c.Program == nil:
		c.add("nothing", c.Node, "does kube-proxy run here? Does something else handle Services, such as Cilium or Calico's eBPF?",
			"the API has %d Services, and neither iptables nor IPVS nor nf_tables has anything of a kube-proxy", len(c.Snapshot.Services))
	}
	for _, d := range c.picked {
		for _, t := range d.Rules.Tables {
			for _, ch := range t.Chains {
				ipvs := strings.HasPrefix(ch.Name, "KUBE-IPVS-") || ch.Name == "KUBE-NODE-PORT" || ch.Name == "KUBE-LOAD-BALANCER" || ch.Name == "KUBE-SOURCE-RANGES-FIREWALL"
				user := strings.HasPrefix(ch.Name, "KUBE-PORTALS-") || strings.HasPrefix(ch.Name, "KUBE-NODEPORT-")
				if (ipvs && mode == proxy.IPTables || user && mode != proxy.Userspace) && len(ch.Rules) > 0 {
					left = append(left, t.Name+"/"+ch.Name)
				}
			}
		}
	}
	if (mode == proxy.IPTables || nft) && slices.Contains(c.Links, "kube-ipvs0") {
		left = append(left, "the device kube-ipvs0")
	}
	if len(left) > 0 {
		f := c.add("mode-leftover", left[0], "kube-proxy --cleanup removes it", "left by another mode of kube-proxy")
		f.Evidence = left
	}
}

// structure looks at how chains hang together.
func (c *checker) structure(d *xtables.Dump) {
	where := ""
	if d.Family == xtables.IPv6 {
		where = " (IPv6)"
	}
	for _, t := range d.Rules.Tables {
		refs := make(map[string]bool)
		for _, ch := range t.Chains {
			for i, r := range ch.Rules {
				if r.Target == "" || !strings.HasPrefix(r.Target, "KUBE-") && r.Target != "KPTRACE" {
					continue
				}
				refs[r.Target] = true
				if t.Chain(r.Target) == nil {
					f := c.add("target-missing", t.Name+"/"+ch.Name, "", "rule %d leads to %s, which is not there%s", i+1, r.Target, where)
					f.Evidence = []string{r.Line(ch.Name)}
				}
			}
		}
		for _, ch := range t.Chains {
			if liverules.KindOf(ch.Name) != liverules.KindNone && !refs[ch.Name] {
				c.add("chain-unused", t.Name+"/"+ch.Name, "", "nothing leads to it%s: its Service changed, or a rule was deleted", where)
			}
		}
	}
	nat := d.Rules.Table("nat")
	entry := func(table *xtables.Table, chain, to, code, what string) {
		if table.Chain(to) == nil {
			return
		}
		if from := table.Chain(chain); from == nil || !slices.ContainsFunc(from.Rules, func(r *xtables.Rule) bool { return r.Target == to }) {
			c.add(code, table.Name+"/"+chain, "restart kube-proxy, or wait for its next full sync (up to an hour)", "%s%s", what, where)
		}
	}
	if nat == nil {
		return
	}
	entry(nat, "PREROUTING", "KUBE-SERVICES", "entry-missing", "nothing leads to KUBE-SERVICES: packets of pods and of clients outside go to no Service")
	entry(nat, "OUTPUT", "KUBE-SERVICES", "entry-missing", "nothing leads to KUBE-SERVICES: packets that the node itself sends go to no Service")
	entry(nat, "POSTROUTING", "KUBE-POSTROUTING", "masquerade-missing", "nothing leads to KUBE-POSTROUTING: what is marked to be masqueraded is not, and answers do not come back")
	if p := nat.Chain("KUBE-POSTROUTING"); p != nil && !slices.ContainsFunc(p.Rules, func(r *xtables.Rule) bool { return r.Target == "MASQUERADE" }) {
		c.add("masquerade-missing", "nat/KUBE-POSTROUTING", "restart kube-proxy", "it has no MASQUERADE rule%s: answers to clients outside do not come back", where)
	}
}

// odds looks at where each address of a Service leads.
func (c *checker) odds(s *liverules.Service) {
	for i := range s.Fronts {
		f := &s.Fronts[i]
		object := s.Name.String()
		switch {
		case f.Chain == "" || f.Verdict == proxy.Reject || f.Verdict == proxy.Drop:
			continue
		case len(f.Choices) == 0:
			if f.Missing > 0 {
				c.add("chain-empty", object, "restart kube-proxy, or wait for its next full sync", "%s by %s leads to no endpoint: %s has no rule for it", f, f.Via, f.Chain)
			}
			continue
		case f.Missing > 0:
			c.add("odds-missing", object, "restart kube-proxy, or wait for its next full sync", "%.1f %% of connections to %s get no endpoint: rules of %s are missing or wrong", 100*f.Missing, f, f.Chain)
			continue
		}
		lo, hi := f.Choices[0], f.Choices[0]
		for _, x := range f.Choices {
			if x.Probability < lo.Probability {
				lo = x
			}
			if x.Probability > hi.Probability {
				hi = x
			}
		}
		if hi.Probability-lo.Probability > 1e-6 {
			f := c.add("odds-uneven", object, "", "of connections to %s, %.1f %% go to %s and %.1f %% to %s", f, 100*hi.Probability, hi.Endpoint, 100*lo.Probability, lo.Endpoint)
			f.Severity = Risk
		}
	}
}

// way walks a packet of a client to an address of a Service, and sees whether
// other rules take or drop it.
func (c *checker) way(s *liverules.Service, f *liverules.Front) {
	if f.Verdict != proxy.Forward {
		return
	}
	client, dst := netip.MustParseAddr("198.51.100.254"), f.Addr
	if s.IP6 {
		client = netip.MustParseAddr("2001:db8::fe")
	}
	if len(s.Ranges) > 0 && f.Via == proxy.ViaLoadBalancer {
		client = s.Ranges[0].Addr()
	}
	program := c.live
	if !dst.IsValid() { // any address of the node
		i := slices.IndexFunc(c.Addrs, func(a netip.Addr) bool { return a.Is6() == s.IP6 && !a.IsLoopback() && !a.IsLinkLocalUnicast() })
		if i >= 0 {
			dst = c.Addrs[i]
		} else if dst = netip.MustParseAddr("192.0.2.1"); s.IP6 {
			dst = netip.MustParseAddr("2001:db8::1")
		}
		if i < 0 {
			if c.assumed == nil {
				c.assumed = liverules.New(liverules.Config{Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}}, c.live.Rulesets()...)
			}
			program = c.assumed
		}
	} else if f.Via == proxy.ViaClusterIP {
		for _, r := range c.live.PodRanges() { // a pod, for that is whom it is for
			if r.Addr().Is6() == s.IP6 {
				client = r.Masked().Addr().Next()
			}
		}
	}
	ways := program.Ways(proxy.Packet{Proto: s.Name.Proto, Src: netip.AddrPortFrom(client, 40000), Dst: netip.AddrPortFrom(dst, f.Port)})
	c.taken(s, f, ways)
	c.dropped(s, f, ways)
	c.untracked(s, f, ways)
}

// taken looks for another rule that translates the packet.
func (c *checker) taken(s *liverules.Service, f *liverules.Front, ways []liverules.Way) {
	for i := range ways {
		w := &ways[i]
		if !w.Endpoint.IsValid() || w.Service == s.Name {
			return
		}
	}
	for i := range ways {
		for _, step := range ways[i].Steps {
			if step.Effect != xtables.EffectDNAT && step.Effect != xtables.EffectRedirect {
				continue
			}
			owner := liverules.Owner(step.Table, step.Chain, step.Rule)
			g := c.add("nodeport-shadowed", s.Name.String(), "give the Service or the other program another port",
				"%s by %s is taken by rule %d of %s/%s%s, which sends it to %s", f, f.Via, step.Index, step.Table, step.Chain, of(owner), step.DstAfter)
			g.Owner, g.Evidence = owner, []string{step.Rule.Line(step.Chain)}
			return
		}
	}
}

func of(owner string) string {
	if owner == "" {
		return ""
	}
	return " (" + owner + ")"
}

// dropped looks for rules and policies that drop what is on its way to an
// endpoint, whatever could not be evaluated.
func (c *checker) dropped(s *liverules.Service, f *liverules.Front, ways []liverules.Way) {
	type fate struct{ drops, passes *liverules.Way }
	fates := make(map[netip.AddrPort]*fate)
	for i := range ways {
		w := &ways[i]
		if !w.Endpoint.IsValid() {
			continue
		}
		x := fates[w.Endpoint]
		if x == nil {
			x = new(fate)
			fates[w.Endpoint] = x
		}
		if (w.Verdict == proxy.Drop || w.Verdict == proxy.Reject) && !w.Unsure {
			x.drops = w
		} else {
			x.passes = w
		}
	}
	for _, choice := range f.Choices { // in order
		x := fates[choice.Endpoint]
		if x == nil || x.drops == nil {
			continue
		}
		last := x.drops.Steps[len(x.drops.Steps)-1]
		where, owner := last.Table+"/"+last.Chain, liverules.Owner(last.Table, last.Chain, last.Rule)
		all, policy := x.passes == nil, last.Rule == nil
		var g *Finding
		switch {
		case all && policy:
			g = c.once("forward-dropped", where, "let service traffic pass: iptables -P FORWARD ACCEPT, or a rule that accepts the pod network (Docker sets the policy to DROP when it starts)",
				"the policy DROP of %s%s drops packets on their way to endpoints of %s and others", last.Chain, of(c.policyOwner(last.Chain, s.IP6)), s.Name)
			if g != nil {
				g.Owner = c.policyOwner(last.Chain, s.IP6)
			}
		case all:
			g = c.add("forward-dropped", s.Name.String(), "", "rule %d of %s%s drops packets to %s on their way to %s", last.Index, where, of(owner), f, choice.Endpoint)
		case policy:
			g = c.once("forward-policy", where, "kptrace explain tells for one client", "its policy is DROP, and whether a rule accepts packets to endpoints depends on what could not be evaluated")
		default:
			g = c.once("foreign-drop", where, "kptrace explain tells for one client", "rule %d%s can drop packets to endpoints of Services", last.Index, of(owner))
		}
		if g != nil && last.Rule != nil {
			g.Owner, g.Evidence = owner, []string{last.Rule.Line(last.Chain)}
		}
	}
}

// policyOwner tells who set the policy of a chain of filter, if that is known.
func (c *checker) policyOwner(chain string, ip6 bool) string {
	for _, d := range c.picked {
		if (d.Family == xtables.IPv6) == ip6 {
			return liverules.PolicyOwner(d.Rules, chain)
		}
	}
	return ""
}

// once adds a finding unless there is one of the same code and object.
func (c *checker) once(code, object, fix, format string, args ...any) *Finding {
	if slices.ContainsFunc(c.findings, func(f Finding) bool { return f.Code == code && f.Object == object }) {
		return nil
	}
	return c.add(code, object, fix, format, args...)
}

// untracked looks for rules of raw that keep the packet from nat.
func (c *checker) untracked(s *liverules.Service, f *liverules.Front, ways []liverules.Way) {
	for i := range ways {
		if ways[i].Packet.State&xtables.StateUntracked == 0 || ways[i].Endpoint.IsValid() {
			return
		}
	}
	for i := range ways {
		for _, step := range ways[i].Steps {
			if step.Table != "raw" || step.Rule == nil || step.Rule.Target != "CT" && step.Rule.Target != "NOTRACK" {
				continue
			}
			owner := liverules.Owner(step.Table, step.Chain, step.Rule)
			g := c.add("not-tracked", s.Name.String(), "if a program on the node answers at this address itself, as NodeLocal DNSCache does, this is intended: --ignore not-tracked:"+s.Name.String(),
				"rule %d of raw/%s%s keeps %s from connection tracking, so that no endpoint is picked", step.Index, step.Chain, of(owner), f)
			g.Owner, g.Evidence = owner, []string{step.Rule.Line(step.Chain)}
			if owner == "NodeLocal DNSCache" {
				g.Severity = Note
			}
			return
		}
	}
}

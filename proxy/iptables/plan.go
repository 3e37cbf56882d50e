package iptables

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// bigUnit is how many lines of one Service are still committed together.
// Beyond it endpoint chains come before and after, in pieces: iptables-nft in a
// user namespace takes about 300 rules at once.
const bigUnit = 150

// plans orders changes so that no connection meets a half-made Service. Each
// Service's part of nat is one commit: its endpoint chains, the chains that
// lead to them, the dispatch. The second plan lifts refusals and must leave out
// those whose owners failed in the first.
func plans(changes []Change) (first, second xtables.Plan) {
	var (
		base     = make(map[string]*xtables.Unit)
		refuse   = xtables.Phase{Name: "refuse"}
		prepare  = xtables.Phase{Name: "endpoint chains"}
		services = xtables.Phase{Name: "services"}
		dispose  = xtables.Phase{Name: "endpoint chains out of use"}
		stale    = xtables.Phase{Name: "stale"}
		admit    = xtables.Phase{Name: "admit"}
	)
	for i := 0; i < len(changes); {
		c := &changes[i]
		if c.all != nil {
			planNew(c, &refuse, &prepare, &services)
			i++
			continue
		}
		if c.Service != (proxy.PortName{}) {
			j := i + 1
			for j < len(changes) && changes[j].Service == c.Service {
				j++
			}
			planService(changes[i:j], &refuse, &prepare, &services, &dispose, &admit)
			i = j
			continue
		}
		i++
		if c.Kind != xtables.Extra && c.what != discard {
			u := base[c.Table]
			if u == nil {
				u = &xtables.Unit{Table: c.Table, Owner: "the fixed rules"}
				base[c.Table] = u
			}
			c.into(u)
			continue
		}
		phase := &admit
		if c.Table == "nat" {
			phase = &stale
		}
		if c.Kind == xtables.Extra || c.whole() {
			u := xtables.Unit{Table: c.Table, Owner: c.owner()}
			c.into(&u)
			phase.Units = append(phase.Units, u)
			continue
		}
		for lines := range slices.Chunk(c.lines(), bigUnit) {
			phase.Units = append(phase.Units, xtables.Unit{Table: c.Table, Owner: c.owner(), Lines: lines})
		}
	}
	fixed := xtables.Phase{Name: "fixed"}
	for _, t := range tables {
		if u := base[t]; u != nil {
			fixed.Units = append(fixed.Units, *u)
		}
	}
	return xtables.Plan{fixed, refuse, prepare, services, dispose, stale}, xtables.Plan{admit}
}

// lineBytes is about the length of a line.
const lineBytes = 80

// planNew orders what makes a Service port of which nothing is there. Its part of
// nat is made when it is written.
func planNew(c *Change, refuse, prepare, services *xtables.Phase) {
	u, owner := c.all, c.owner()
	refusals := xtables.Unit{Table: "filter", Owner: owner}
	eps := u.reached()
	used := len(eps) > 0 // of nat
	shared := u.render(dispatch).shared
	for i := len(shared) - 1; i >= 0; i-- {
		if c, ok := shared[i].diff(&rendered{}); ok && c.Table == "filter" {
			c.into(&refusals)
		} else {
			used = used || ok
		}
	}
	if len(refusals.Lines) > 0 {
		refuse.Units = append(refuse.Units, refusals)
	}
	if !used {
		return
	}
	if size := u.about(len(eps)); size <= bigUnit {
		services.Units = append(services.Units, xtables.Unit{Table: "nat", Owner: owner, About: size * lineBytes,
			Make: func(rules bool) ([]xtables.ChainText, []string) { return u.nat(rules, true, u.reached()) }})
		return
	}
	for part := range slices.Chunk(eps, bigUnit/4) {
		prepare.Units = append(prepare.Units, xtables.Unit{Table: "nat", Owner: owner, About: 4 * len(part) * lineBytes,
			Make: func(rules bool) ([]xtables.ChainText, []string) { return u.nat(rules, false, part) }})
	}
	services.Units = append(services.Units, xtables.Unit{Table: "nat", Owner: owner, About: 2 * len(eps) * lineBytes,
		Make: func(rules bool) ([]xtables.ChainText, []string) { return u.nat(rules, true, nil) }})
}

// about is how many lines u has in nat, or somewhat less, with eps endpoints.
func (u *unit) about(eps int) int {
	lines, each := 8+len(u.svc.SourceRanges)+len(u.svc.ExternalIPs)+2*len(u.svc.LoadBalancerIPs), 1
	if u.svc.Affinity > 0 {
		each++
	}
	lines += (3 + each) * eps
	if u.by.cfg.Trace {
		lines += eps
	}
	if u.svc.UsesLocal() {
		lines += each * len(u.sel.Local)
	}
	return lines
}

// nat makes u's part of nat as text: the chains of eps and, with lead, those that
// lead to them and the dispatch.
func (u *unit) nat(rules, lead bool, eps []netip.AddrPort) (chains []xtables.ChainText, lines []string) {
	d := named
	if rules {
		d = whole
	}
	w := u.writer(d)
	w.endpoints(eps)
	if lead {
		w.write()
	}
	if rules && lead && eps != nil {
		u.note(&w.rendered)
	}
	chains = make([]xtables.ChainText, len(w.chains))
	for i := range w.chains {
		chains[i] = xtables.ChainText{Name: w.chains[i].name, Rules: w.chains[i].rules}
	}
	for i := len(w.shared) - 1; i >= 0; i-- {
		if c, ok := w.shared[i].diff(&rendered{}); ok && c.Table == "nat" {
			lines = append(lines, c.lines()...)
		}
	}
	return chains, lines
}

// planService orders the changes of one Service port.
func planService(changes []Change, refuse, prepare, services, dispose, admit *xtables.Phase) {
	owner := changes[0].owner()
	add := func(p *xtables.Phase, u xtables.Unit) {
		if len(u.Chains)+len(u.Lines) > 0 {
			u.Owner = owner
			p.Units = append(p.Units, u)
		}
	}
	refusals, admissions := xtables.Unit{Table: "filter"}, xtables.Unit{Table: "filter"}
	nat := xtables.Unit{Table: "nat", Chains: make([]xtables.ChainText, 0, len(changes))}
	size, endpoints := 0, 0 // of nat: the lines, and how many chains of endpoints lead it
	var dead []string
	for i := range changes {
		c := &changes[i]
		switch {
		case c.Table == "filter" && c.what == discard:
			c.into(&admissions)
		case c.Table == "filter":
			c.into(&refusals)
		case c.Kind == xtables.Extra:
			dead, size = append(dead, c.lines()...), size+2
		case c.whole() && strings.HasPrefix(c.Chain, prefixEndpoint):
			nat.Chains, size = slices.Insert(nat.Chains, endpoints, c.text()), size+1+len(c.rules)
			endpoints++
		default:
			c.into(&nat)
			size += 1 + len(c.rules) + len(c.Add) + len(c.Remove)
		}
	}
	add(refuse, refusals)
	if size <= bigUnit {
		nat.Lines = append(nat.Lines, dead...)
		add(services, nat)
	} else {
		for part := range slices.Chunk(nat.Chains[:endpoints], bigUnit/4) {
			add(prepare, xtables.Unit{Table: "nat", Chains: part})
		}
		nat.Chains = nat.Chains[endpoints:]
		add(services, nat)
		for part := range slices.Chunk(dead, bigUnit/2) {
			add(dispose, xtables.Unit{Table: "nat", Lines: part})
		}
	}
	add(admit, admissions)
}

// leaveOut leaves out the units of owners that failed before.
func leaveOut(plan xtables.Plan, failed []xtables.UnitError) xtables.Plan {
	if len(failed) == 0 {
		return plan
	}
	out := slices.Clone(plan)
	for i := range out {
		out[i].Units = slices.DeleteFunc(slices.Clone(out[i].Units), func(u xtables.Unit) bool {
			return slices.ContainsFunc(failed, func(f xtables.UnitError) bool { return f.Owner == u.Owner })
		})
	}
	return out
}

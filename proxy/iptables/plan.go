package iptables

import (
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
			u.Lines = append(u.Lines, c.lines()...)
			continue
		}
		phase := &admit
		if c.Table == "nat" {
			phase = &stale
		}
		if c.Kind == xtables.Extra {
			phase.Units = append(phase.Units, xtables.Unit{Table: c.Table, Owner: c.owner(), Lines: c.lines()})
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

// planService orders the changes of one Service port.
func planService(changes []Change, refuse, prepare, services, dispose, admit *xtables.Phase) {
	owner := changes[0].owner()
	add := func(p *xtables.Phase, table string, lines []string) {
		if len(lines) > 0 {
			p.Units = append(p.Units, xtables.Unit{Table: table, Owner: owner, Lines: lines})
		}
	}
	var refusals, admissions []string
	var endpoints, nat, dead [][]string // the lines of each change
	size := 0
	for i := range changes {
		c := &changes[i]
		lines := c.lines()
		switch {
		case c.Table == "filter" && c.what == discard:
			admissions = append(admissions, lines...)
		case c.Table == "filter":
			refusals = append(refusals, lines...)
		case c.Kind == xtables.Extra:
			dead, size = append(dead, lines), size+len(lines)
		case strings.HasPrefix(c.Chain, prefixEndpoint):
			endpoints, size = append(endpoints, lines), size+len(lines)
		default:
			nat, size = append(nat, lines), size+len(lines)
		}
	}
	add(refuse, "filter", refusals)
	if size <= bigUnit {
		add(services, "nat", slices.Concat(slices.Concat(endpoints...), slices.Concat(nat...), slices.Concat(dead...)))
	} else {
		for part := range slices.Chunk(endpoints, bigUnit/4) {
			add(prepare, "nat", slices.Concat(part...))
		}
		add(services, "nat", slices.Concat(nat...))
		for part := range slices.Chunk(dead, bigUnit/4) {
			add(dispose, "nat", slices.Concat(part...))
		}
	}
	add(admit, "filter", admissions)
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

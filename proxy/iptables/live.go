package iptables

import (
	"slices"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// live is what iptables-save read.
type live struct {
	*xtables.Listing
	shared map[[2]string]map[string]place
}

type place struct{ at, times int }

func newLive(have *xtables.Listing) *live {
	return &live{have, make(map[[2]string]map[string]place)}
}

func (l *live) own(table, name string) ([]string, bool) { return l.Chain(table, name) }

func (l *live) places(table, chain string) map[string]place {
	key := [2]string{table, chain}
	m, ok := l.shared[key]
	if !ok {
		rules, _ := l.own(table, chain)
		m = make(map[string]place, len(rules))
		for i, r := range rules {
			m[r] = place{i + 1, m[r].times + 1}
		}
		l.shared[key] = m
	}
	return m
}

func (l *live) stands(table, chain, rule string) (at, times int) {
	p := l.places(table, chain)[rule]
	return p.at, p.times
}

func (l *live) diff(f *fixed, units []*unit) []Change {
	out := l.fixed(f)
	wanted := make(map[[2]string]bool) // chains
	rules := make(map[[3]string]bool)  // rules in shared chains
	bare := l.bare(f)
	if bare {
		out = slices.Grow(out, len(units))
	}
	for _, u := range units {
		if bare {
			out = append(out, Change{Service: u.svc.Name, Kind: xtables.Missing, all: u})
			continue
		}
		r := u.render(whole)
		out = r.diff(out, u.svc.Name, l)
		for i := range r.chains {
			wanted[[2]string{r.chains[i].table, r.chains[i].name}] = true
		}
		for _, g := range r.shared {
			for _, text := range g.rules {
				rules[[3]string{g.table, g.chain, text}] = true
			}
		}
	}
	for i := range f.shared {
		c := &f.shared[i]
		if c.name == chainReroute {
			wanted[[2]string{c.table, c.name}] = true
			continue // what stands there has its own time
		}
		for _, r := range c.last {
			rules[[3]string{c.table, c.name, r}] = true
		}
		d := Change{Table: c.table, Chain: c.name, Kind: xtables.Changed, what: discard}
		there, _ := l.own(c.table, c.name)
		for _, r := range there {
			if !rules[[3]string{c.table, c.name, r}] {
				d.Remove = append(d.Remove, r)
			}
		}
		if len(d.Remove) > 0 {
			out = append(out, d)
		}
	}
	for i := range f.own {
		wanted[[2]string{f.own[i].table, f.own[i].name}] = true
	}
	return append(out, l.stale(wanted)...)
}

// bare reports whether nothing of any Service is there.
func (l *live) bare(f *fixed) bool {
	for i := range f.shared {
		if _, ok := l.own(f.shared[i].table, f.shared[i].name); ok {
			return false
		}
	}
	return !slices.ContainsFunc(l.Chains("nat"), isServiceChain)
}

// fixed compares what does not depend on Services.
func (l *live) fixed(f *fixed) []Change {
	var out []Change
	for i := range f.own {
		if d, ok := f.own[i].diff(l); ok {
			out = append(out, d)
		}
	}
	for i := range f.shared {
		c := &f.shared[i]
		there, ok := l.own(c.table, c.name)
		if !ok {
			out = append(out, Change{Table: c.table, Chain: c.name, Kind: xtables.Missing, Add: c.last, rules: c.last})
			continue
		}
		d := Change{Table: c.table, Chain: c.name, Kind: xtables.Changed, Add: c.last, what: extend}
		for _, r := range c.last {
			_, times := l.stands(c.table, c.name, r)
			for range times {
				d.Remove = append(d.Remove, r)
			}
		}
		if n := len(there) - len(c.last); n < 0 || !slices.Equal(there[n:], c.last) || len(d.Remove) != len(c.last) {
			out = append(out, d)
		}
	}
	for i := range f.foreign {
		out = append(out, l.extended(&f.foreign[i])...)
	}
	return append(out, l.jumps(f.jumps)...)
}

// extended adds our rules to a chain of others.
func (l *live) extended(c *chain) []Change {
	if _, ok := l.own(c.table, c.name); !ok {
		return []Change{{Table: c.table, Chain: c.name, Kind: xtables.Missing, Add: c.rules, rules: c.rules}}
	}
	var out []Change
	for _, r := range c.rules {
		if _, times := l.stands(c.table, c.name, r); times == 0 {
			out = append(out, Change{Table: c.table, Chain: c.name, Kind: xtables.Changed, Add: []string{r}, what: extend})
		}
	}
	return out
}

// jumps compares the jump rules. One that is there stays where it is.
func (l *live) jumps(want []jumpRule) []Change {
	var out []Change
	for i := range want {
		j := &want[i]
		d := Change{Table: j.table, Chain: j.chain, Kind: xtables.Changed}
		_, times := l.stands(j.table, j.chain, j.rule)
		switch {
		case times == 0:
			d.Add, d.what = []string{j.rule}, insert
		case times > 1:
			d.Remove, d.what = slices.Repeat([]string{j.rule}, times-1), discard
		default:
			continue
		}
		out = append(out, d)
	}
	for _, j := range knownJumps(l.Family) {
		_, times := l.stands(j.table, j.chain, j.rule)
		if times > 0 && (j.to == chainTrace && !l.watched() || j.to == chainReroute) && !slices.Contains(want, j) {
			out = append(out, Change{Table: j.table, Chain: j.chain, Kind: xtables.Changed,
				Remove: slices.Repeat([]string{j.rule}, times), what: discard})
		}
	}
	return out
}

// watched reports whether an agent is beside us, whose chain has the name of ours
// and whose jumps look like ours.
func (l *live) watched() bool {
	_, ok := l.own("mangle", proxy.ChainPick)
	return ok
}

// stale lists chains of Services that are no more, those that lead to others
// first, and chains of our own where they are not wanted.
func (l *live) stale(wanted map[[2]string]bool) []Change {
	var out []Change
	if rules, ok := l.own("mangle", chainTrace); ok && !l.watched() && !wanted[[2]string{"mangle", chainTrace}] {
		out = append(out, Change{Table: "mangle", Chain: chainTrace, Kind: xtables.Extra, Remove: rules})
	}
	if rules, ok := l.own("nat", chainReroute); ok && !wanted[[2]string{"nat", chainReroute}] {
		out = append(out, Change{Table: "nat", Chain: chainReroute, Kind: xtables.Extra, Remove: rules})
	}
	for _, prefix := range [...]string{prefixFirewall, prefixExternal, prefixService, prefixLocal, prefixEndpoint} {
		for _, name := range l.Chains("nat") {
			if len(name) > len(prefix) && name[:len(prefix)] == prefix && !wanted[[2]string{"nat", name}] {
				rules, _ := l.own("nat", name)
				out = append(out, Change{Table: "nat", Chain: name, Kind: xtables.Extra, Remove: rules})
			}
		}
	}
	return out
}

package xtables

import (
	"fmt"
	"slices"
	"strings"
)

// Layout is a set of chains that are ours as a whole, and the jumps to them from
// the built-in ones: what a mode programs whose rules do not grow with the
// number of Services.
type Layout struct {
	Family Family
	Chains []LayoutChain
	// Jumps are put at the head of their chains in this order, so the last one
	// ends up first. One that is there stays where it is.
	Jumps []LayoutJump
}

// LayoutChain is a chain and its rules as iptables-restore takes them behind
// "-A CHAIN".
type LayoutChain struct {
	Table, Name string
	Rules       []string
}

// LayoutJump is a rule of a built-in chain that leads to a chain of a Layout.
type LayoutJump struct {
	Table, Chain, Rule string
}

// Text returns the layout as iptables-restore --noflush takes it on a host that
// has none of it yet.
func (l *Layout) Text() string { return l.plan(&Ruleset{Family: l.Family}).Text() }

// Rules counts the rules of each table, jumps included.
func (l *Layout) Rules() map[string]int {
	n := map[string]int{}
	for i := range l.Chains {
		n[l.Chains[i].Table] += len(l.Chains[i].Rules)
	}
	for i := range l.Jumps {
		n[l.Jumps[i].Table]++
	}
	return n
}

// Ruleset returns the layout as rules, for a walk: in built-in chains stand our
// jumps alone.
func (l *Layout) Ruleset() (*Ruleset, error) {
	rs := &Ruleset{Family: l.Family}
	for i := range l.Chains {
		c := &l.Chains[i]
		into := rs.Ensure(c.Table).Ensure(c.Name, "-")
		for _, text := range c.Rules {
			r, err := ParseRule(l.Family, text)
			if err != nil {
				return nil, fmt.Errorf("xtables: chain %s: %w", c.Name, err)
			}
			into.Add(r)
		}
	}
	for i := len(l.Jumps) - 1; i >= 0; i-- {
		j := &l.Jumps[i]
		r, err := ParseRule(l.Family, j.Rule)
		if err != nil {
			return nil, fmt.Errorf("xtables: jump from %s: %w", j.Chain, err)
		}
		rs.Ensure(j.Table).Ensure(j.Chain, "ACCEPT").Add(r)
	}
	return rs, nil
}

// Plan lists what brings a host that has the rules have to the layout: one
// commit for each table that differs. Chains for which stale holds are taken
// away with the jumps from built-in chains to them.
func (l *Layout) Plan(have *Ruleset, stale func(table, chain string) bool) Plan {
	plan := l.plan(have)
	return append(plan, removal(have, func(table, chain string) bool {
		return stale != nil && stale(table, chain) && !l.has(table, chain)
	})...)
}

func (l *Layout) has(table, chain string) bool {
	return slices.ContainsFunc(l.Chains, func(c LayoutChain) bool { return c.Table == table && c.Name == chain })
}

func (l *Layout) plan(have *Ruleset) Plan {
	ph := Phase{Name: "chains"}
	for _, table := range l.tables() {
		var lines []string
		for i := range l.Chains {
			if c := &l.Chains[i]; c.Table == table && !l.same(c, have.Chain(table, c.Name)) {
				lines = append(lines, ":"+c.Name+" - [0:0]")
				for _, r := range c.Rules {
					lines = append(lines, "-A "+c.Name+" "+r)
				}
			}
		}
		for i := range l.Jumps {
			j := &l.Jumps[i]
			if j.Table != table {
				continue
			}
			switch times := l.times(j, have.Chain(table, j.Chain)); {
			case times == 0:
				lines = append(lines, "-I "+j.Chain+" "+j.Rule)
			case times > 1:
				lines = append(lines, slices.Repeat([]string{"-D " + j.Chain + " " + j.Rule}, times-1)...)
			}
		}
		if len(lines) > 0 {
			ph.Units = append(ph.Units, Unit{Table: table, Owner: "the fixed rules", Lines: lines})
		}
	}
	if len(ph.Units) == 0 {
		return nil
	}
	return Plan{ph}
}

func (l *Layout) tables() []string {
	var out []string
	for _, t := range []string{"raw", "mangle", "filter", "nat", "security"} {
		if slices.ContainsFunc(l.Chains, func(c LayoutChain) bool { return c.Table == t }) {
			out = append(out, t)
		}
	}
	return out
}

// canonical returns a rule as it compares with one that was read back.
func (l *Layout) canonical(text string) string {
	r, err := ParseRule(l.Family, text)
	if err != nil {
		return text
	}
	return r.String()
}

func (l *Layout) same(want *LayoutChain, have *Chain) bool {
	return have != nil && slices.EqualFunc(want.Rules, have.Rules, func(text string, r *Rule) bool {
		return l.canonical(text) == r.String()
	})
}

func (l *Layout) times(j *LayoutJump, have *Chain) int {
	if have == nil {
		return 0
	}
	n, want := 0, l.canonical(j.Rule)
	for _, r := range have.Rules {
		if r.String() == want {
			n++
		}
	}
	return n
}

// Removal lists what takes away the chains for which ours holds, with all jumps
// to them from built-in chains. A chain to which rules of others lead stays; the
// errors name it.
func Removal(have *Ruleset, ours func(table, chain string) bool) (Plan, []error) {
	var errs []error
	keep := map[[2]string]bool{}
	for _, t := range have.Tables {
		for _, c := range t.Chains {
			if c.Policy != "-" || ours(t.Name, c.Name) {
				continue
			}
			for _, r := range c.Rules {
				if r.Target != "" && ours(t.Name, r.Target) && t.Chain(r.Target) != nil {
					keep[[2]string{t.Name, r.Target}] = true
					errs = append(errs, fmt.Errorf("xtables: chain %s of %s stays: the rule %q in %s, which is not ours, leads to it",
						r.Target, t.Name, r, c.Name))
				}
			}
		}
		for again := true; again; { // what a chain that stays leads to stays too
			again = false
			for _, c := range t.Chains {
				if !keep[[2]string{t.Name, c.Name}] {
					continue
				}
				for _, r := range c.Rules {
					key := [2]string{t.Name, r.Target}
					if r.Target != "" && ours(t.Name, r.Target) && !keep[key] && t.Chain(r.Target) != nil {
						keep[key], again = true, true
					}
				}
			}
		}
	}
	return removal(have, func(table, chain string) bool { return ours(table, chain) && !keep[[2]string{table, chain}] }), errs
}

func removal(have *Ruleset, gone func(table, chain string) bool) Plan {
	ph := Phase{Name: "removal"}
	for _, t := range have.Tables {
		var jumps, empty, drop []string
		for _, c := range t.Chains {
			if gone(t.Name, c.Name) {
				empty = append(empty, ":"+c.Name+" - [0:0]")
				drop = append(drop, "-X "+c.Name)
				continue
			}
			if c.Policy == "-" {
				continue
			}
			for _, r := range c.Rules {
				if r.Target != "" && gone(t.Name, r.Target) {
					jumps = append(jumps, "-D "+c.Name+" "+strings.TrimSpace(r.String()))
				}
			}
		}
		if lines := slices.Concat(empty, jumps, drop); len(lines) > 0 {
			ph.Units = append(ph.Units, Unit{Table: t.Name, Owner: "chains out of use", Lines: lines})
		}
	}
	if len(ph.Units) == 0 {
		return nil
	}
	return Plan{ph}
}

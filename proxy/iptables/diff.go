package iptables

import (
	"fmt"
	"slices"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Change is one chain in which the kernel and a Program differ.
type Change struct {
	Table, Chain string
	// Service is whose chain or rules these are, zero where they serve all.
	Service proxy.PortName
	// Kind is Missing, Extra or Changed. A chain that all Services share is
	// only Missing or Changed.
	Kind xtables.DiffKind
	// Add and Remove are rules as iptables-save prints them.
	Add, Remove []string

	what change
	// rules is what the whole chain should hold, where it is ours alone.
	rules []string
	// all, if set, is a unit of which nothing is there yet, and the Change one of
	// Service alone: its rules are made when they are written.
	all *unit
}

// change says how a Change is put right.
type change uint8

const (
	rewrite change = iota // the chain is ours as a whole
	insert                // Remove, then Add at the head
	extend                // Remove, then Add at the end
	discard               // Remove only
)

// Diff compares what iptables-save read with a Program of this package. It is
// what Apply repairs by and what a check reports. Chains and rules of others
// do not matter, and counters neither. Of a Program of both families the one of
// have is taken.
func Diff(have *xtables.Ruleset, want proxy.Program) []Change { return DiffPart(have, want, nil) }

// DiffPart is Diff of the rules that serve some Services or all of them together; of
// others have knows nothing. nil means every Service.
func DiffPart(have *xtables.Ruleset, want proxy.Program, in func(proxy.PortName) bool) []Change {
	if dual, ok := want.(*dualProgram); ok {
		if want = dual.v4; have.Family == xtables.IPv6 {
			want = dual.v6
		}
	}
	p, ok := want.(*program)
	if !ok || p.cfg.Family != have.Family {
		return nil
	}
	units := p.units
	if in != nil {
		units = slices.DeleteFunc(slices.Clone(units), func(u *unit) bool { return !in(u.svc.Name) })
	}
	var out []Change
	var others map[string]bool // chains of Services that are left out
	for _, c := range newLive(xtables.List(have)).diff(p.fixed, units) {
		if c.Kind == xtables.Extra && in != nil {
			if others == nil {
				others = namedBy(p.units, in)
			}
			if others[c.Chain] {
				continue
			}
		}
		if c.all != nil {
			out = c.all.render(whole).diff(out, c.Service, &rendered{})
			continue
		}
		out = append(out, c)
	}
	return out
}

// namedBy names the chains of Services that in leaves out.
func namedBy(units []*unit, in func(proxy.PortName) bool) map[string]bool {
	names := map[string]bool{}
	for _, u := range units {
		if in(u.svc.Name) {
			continue
		}
		for _, c := range u.render(named).chains {
			names[c.name] = true
		}
	}
	return names
}

// having is what is there now, of one Service port or of all.
type having interface {
	// own returns a chain's rules if the chain is there.
	own(table, chain string) (rules []string, ok bool)
	// stands returns the place of a rule in a shared chain, from 1, and how
	// often it is there.
	stands(table, chain, rule string) (place, times int)
}

// diff adds what turns h into r, the rules of a Service port.
func (r *rendered) diff(out []Change, of proxy.PortName, h having) []Change {
	// Each group goes to the head of its chain, so the last one comes first.
	for i := len(r.shared) - 1; i >= 0; i-- {
		if c, ok := r.shared[i].diff(h); ok {
			c.Service = of
			out = append(out, c)
		}
	}
	for i := range r.chains {
		if c, ok := r.chains[i].diff(h); ok {
			c.Service = of
			out = append(out, c)
		}
	}
	return out
}

func (c *chain) diff(h having) (Change, bool) {
	d := Change{Table: c.table, Chain: c.name, Kind: xtables.Missing, Add: c.rules, rules: c.rules}
	there, ok := h.own(c.table, c.name)
	if ok {
		if slices.Equal(there, c.rules) {
			return d, false
		}
		d.Kind, d.Add, d.Remove = xtables.Changed, without(c.rules, there), without(there, c.rules)
	}
	return d, true
}

// without returns the rules in a that are not in b.
func without(a, b []string) []string {
	var out []string
	in := make(map[string]bool, len(b)) // a Service may have 20,000 source ranges
	for _, s := range b {
		in[s] = true
	}
	for _, s := range a {
		if !in[s] {
			out = append(out, s)
		}
	}
	return out
}

func (g *group) diff(h having) (Change, bool) {
	d := Change{Table: g.table, Chain: g.chain, Kind: xtables.Changed, Add: g.rules, what: insert}
	intact, last := true, 0
	for _, r := range g.rules {
		place, times := h.stands(g.table, g.chain, r)
		intact = intact && times == 1 && place > last
		last = place
		for range times {
			d.Remove = append(d.Remove, r)
		}
	}
	return d, !intact
}

// gone adds what of the old rules of a Service port is to be taken away; keep is
// what takes their place.
func (r *rendered) gone(out []Change, of proxy.PortName, keep *rendered) []Change {
	for _, g := range r.shared {
		var rest []string
		for _, text := range g.rules {
			if !keep.shares(g.table, g.chain, text) {
				rest = append(rest, text)
			}
		}
		if len(rest) > 0 {
			out = append(out, Change{Table: g.table, Chain: g.chain, Service: of,
				Kind: xtables.Changed, Remove: rest, what: discard})
		}
	}
	for i := len(r.chains) - 1; i >= 0; i-- { // those that lead to others first
		c := &r.chains[i]
		if _, ok := keep.own(c.table, c.name); !ok {
			out = append(out, Change{Table: c.table, Chain: c.name, Service: of, Kind: xtables.Extra, Remove: c.rules})
		}
	}
	return out
}

func (r *rendered) own(table, name string) ([]string, bool) {
	for i := range r.chains {
		if r.chains[i].name == name && r.chains[i].table == table {
			return r.chains[i].rules, true
		}
	}
	return nil, false
}

func (r *rendered) stands(table, chain, rule string) (place, times int) {
	n := 0
	for _, g := range r.shared {
		if g.table != table || g.chain != chain {
			continue
		}
		for _, text := range g.rules {
			if n++; text == rule {
				place, times = n, times+1
			}
		}
	}
	return place, times
}

func (r *rendered) shares(table, chain, rule string) bool {
	_, times := r.stands(table, chain, rule)
	return times > 0
}

// since lists what turns old into p, given that both have the same fixed rules.
func (p *program) since(old *program) []Change {
	var out []Change
	were, are := differing(old.units, p.units)
	before := make(map[proxy.PortName]*unit, len(were))
	for _, u := range were {
		before[u.svc.Name] = u
	}
	for _, u := range are {
		was := before[u.svc.Name]
		delete(before, u.svc.Name)
		switch was {
		case u:
		case nil:
			out = append(out, Change{Service: u.svc.Name, Kind: xtables.Missing, all: u})
		default:
			now, then := u.render(whole), was.render(whole)
			out = now.diff(out, u.svc.Name, then)
			out = then.gone(out, u.svc.Name, now)
		}
	}
	for _, u := range were { // in order, and after all that may take over their addresses
		if before[u.svc.Name] == u {
			out = u.render(whole).gone(out, u.svc.Name, &rendered{})
		}
	}
	return out
}

// differing leaves out what two lists have in common at their head and at their
// end, which is nearly all of them.
func differing(a, b []*unit) (x, y []*unit) {
	for len(a) > 0 && len(b) > 0 && a[0] == b[0] {
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && a[len(a)-1] == b[len(b)-1] {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	return a, b
}

// owner names whom a change is for, in plans and errors.
func (c *Change) owner() string {
	if c.Service == (proxy.PortName{}) {
		return "chain " + c.Chain
	}
	return fmt.Sprintf("Service %s %s", c.Service, c.Service.Proto)
}

// whole reports whether the chain is written as a whole, which is rules.
func (c *Change) whole() bool {
	return c.Kind == xtables.Missing || c.Kind != xtables.Extra && c.what == rewrite
}

func (c *Change) text() xtables.ChainText { return xtables.ChainText{Name: c.Chain, Rules: c.rules} }

// into adds to a unit what puts the change right.
func (c *Change) into(u *xtables.Unit) {
	if c.whole() {
		u.Chains = append(u.Chains, c.text())
		return
	}
	u.Lines = append(u.Lines, c.lines()...)
}

// lines writes what puts a change right that does not write the whole chain.
func (c *Change) lines() []string {
	if c.Kind == xtables.Extra {
		return []string{":" + c.Chain + " - [0:0]", "-X " + c.Chain}
	}
	var out []string
	for _, r := range c.Remove {
		out = append(out, "-D "+c.Chain+" "+r)
	}
	switch c.what {
	case insert:
		for i := len(c.Add) - 1; i >= 0; i-- {
			out = append(out, "-I "+c.Chain+" "+c.Add[i])
		}
	case extend:
		for _, r := range c.Add {
			out = append(out, "-A "+c.Chain+" "+r)
		}
	}
	return out
}

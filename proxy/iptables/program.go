package iptables

import (
	"bytes"
	"sync"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// program is what one Snapshot and Overlay ask for.
type program struct {
	cfg      *Config
	node     proxy.Node
	fixed    *fixed
	units    []*unit // in the order of the Snapshot
	claims   map[proxy.Claim]proxy.Owner
	problems []proxy.Problem
	walks    *proxy.WalkCache[walkKey]

	indexed sync.Once // guards index
	index   proxy.Index
}

// Index lists the tagged rules. It is made when first asked for: programming
// does not wait for it.
func (p *program) Index() proxy.Index {
	p.indexed.Do(func() {
		n := len(p.fixed.tagged)
		for _, u := range p.units {
			n += len(u.tagged())
		}
		p.index = make(proxy.Index, n)
		add := func(rules []*proxy.Rule) {
			for _, r := range rules {
				if err := p.index.Add(r); err != nil {
					panic(err) // tags are made of hashes
				}
			}
		}
		add(p.fixed.tagged)
		for _, u := range p.units {
			add(u.tagged())
		}
	})
	return p.index
}

// Problems lists what could not be rendered.
func (p *program) Problems() []proxy.Problem { return p.problems }

// tables is the order in which tables are written.
var tables = [...]string{"mangle", "filter", "nat"}

// Text returns the program as iptables-restore --noflush takes it on a host
// that has none of it yet.
func (p *program) Text() string {
	var b bytes.Buffer
	p.writeRules(&b, renderAll(p.units), true)
	return b.String()
}

// writeRules writes the fixed rules and those of units. With insert, jumps are
// inserted into built-in chains that are not named; else those chains are
// written as if nothing but our jumps stood in them, as iptables-save would.
func (p *program) writeRules(b *bytes.Buffer, units []*rendered, insert bool) {
	for _, table := range tables {
		b.WriteString("*" + table + "\n")
		if !insert {
			for _, name := range builtIn(table) {
				b.WriteString(":" + name + " ACCEPT [0:0]\n")
			}
		}
		p.eachChain(table, units, func(name string, _ []string) { b.WriteString(":" + name + " - [0:0]\n") })
		p.eachChain(table, units, func(name string, rules []string) {
			for _, rule := range rules {
				b.WriteString("-A ")
				b.WriteString(name)
				b.WriteByte(' ')
				b.WriteString(rule)
				b.WriteByte('\n')
			}
		})
		jumps := p.fixed.jumps
		for i := range jumps {
			verb := "-I "
			if !insert {
				i, verb = len(jumps)-1-i, "-A "
			}
			if j := &jumps[i]; j.table == table {
				b.WriteString(verb + j.chain + " " + j.rule + "\n")
			}
		}
		b.WriteString("COMMIT\n")
	}
}

// RuleCounts counts the rules of each table, jumps from built-in chains
// included.
func (p *program) RuleCounts() map[proxy.Table]int {
	six := p.cfg.Family == xtables.IPv6
	n := map[proxy.Table]int{}
	for _, table := range tables {
		t := proxy.Table{IP6: six, Name: table}
		n[t] = 0
		p.eachChain(table, nil, func(_ string, rules []string) { n[t] += len(rules) })
	}
	nat, filter := proxy.Table{IP6: six, Name: "nat"}, proxy.Table{IP6: six, Name: "filter"}
	for _, u := range p.units {
		a, b := u.count()
		n[nat], n[filter] = n[nat]+a, n[filter]+b
	}
	for i := range p.fixed.jumps {
		n[proxy.Table{IP6: six, Name: p.fixed.jumps[i].table}]++
	}
	return n
}

func renderAll(units []*unit) []*rendered {
	all := make([]*rendered, len(units))
	for i, u := range units {
		all[i] = u.render(whole)
	}
	return all
}

// eachChain calls f for every chain of a table, in a fixed order.
func (p *program) eachChain(table string, units []*rendered, f func(name string, rules []string)) {
	for i := range p.fixed.shared {
		c := &p.fixed.shared[i]
		if c.table != table {
			continue
		}
		var rules []string
		for _, u := range units {
			for _, g := range u.shared {
				if g.table == table && g.chain == c.name {
					rules = append(rules, g.rules...)
				}
			}
		}
		f(c.name, append(rules, c.last...))
	}
	for _, own := range [][]chain{p.fixed.own, p.fixed.foreign} {
		for i := range own {
			if own[i].table == table {
				f(own[i].name, own[i].rules)
			}
		}
	}
	for _, u := range units {
		for i := range u.chains {
			if u.chains[i].table == table {
				f(u.chains[i].name, u.chains[i].rules)
			}
		}
	}
}

func builtIn(table string) []string {
	switch table {
	case "filter":
		return []string{"INPUT", "FORWARD", "OUTPUT"}
	case "nat":
		return []string{"PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"}
	}
	return []string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}
}

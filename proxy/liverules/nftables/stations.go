package nftables

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// station is a chain at a hook: one of kube-proxy's, or of iptables.
type station struct {
	base     *chain
	of       *table // whose base is
	table    string // of iptables
	nat      bool
	priority int
	listed   int // the place of its table in the list
}

// priorities are those of the tables of iptables, but of nat where it translates
// sources.
var priorities = map[string]int{"raw": -300, "mangle": -150, "nat": -100, "filter": 0, "security": 50} //nolint:gochecknoglobals // a table

// tablesOfIPTables are those of iptables-nft.
var tablesOfIPTables = []string{"raw", "mangle", "nat", "filter", "security"} //nolint:gochecknoglobals // a table

// tablesAt are the tables of iptables with a chain at a hook.
var tablesAt = map[string][]string{ //nolint:gochecknoglobals // a table
	"prerouting": {"raw", "mangle", "nat"}, "input": {"mangle", "filter", "security", "nat"},
	"forward": {"mangle", "filter", "security"}, "output": {"raw", "mangle", "nat", "filter", "security"},
	"postrouting": {"mangle", "nat"},
}

// stations are the chains at a hook in the order in which packets meet them: by
// priority, and of those with the same the one first that was made last, as the
// kernel puts them (nf_hook_entries_grow).
func (p *Program) stations(t *table, hook string) []station {
	family := "ip"
	if t.six {
		family = "ip6"
	}
	listed := func(name string) int { return slices.Index(p.order, family+" "+name) }
	var all []station
	tables := []*table{t}
	if p.cfg.Others {
		for _, x := range p.foreign {
			iptables := x.family != "inet" && slices.Contains(tablesOfIPTables, x.name)
			if (x.family == "inet" || x.six == t.six) && !x.dormant && !(iptables && p.cfg.Beside != nil) {
				tables = append(tables, x)
			}
		}
	}
	for _, x := range tables {
		for _, b := range slices.Backward(x.bases) {
			if b.hook == hook {
				all = append(all, station{base: b, of: x, nat: b.kind == "nat", priority: b.priority, listed: slices.Index(p.order, x.family+" "+x.name)})
			}
		}
	}
	if p.cfg.Beside != nil {
		for _, name := range tablesAt[hook] {
			s := station{table: name, nat: name == "nat", priority: priorities[name], listed: listed(name)}
			if s.nat && (hook == "input" || hook == "postrouting") {
				s.priority = 100
			}
			all = append(all, s)
		}
	}
	slices.SortStableFunc(all, func(a, b station) int {
		if a.priority != b.priority {
			return a.priority - b.priority
		}
		return b.listed - a.listed
	})
	return all
}

// station takes a packet through one chain. Of the chains of nat those behind the one
// that translated it do not see it, nor do any once its connection's hook of the same
// kind is past, as when it comes back by lo.
func (p *Program) station(k *walker, s *station, w way, fromNode bool) []result {
	side := 0
	if w.hook == "input" || w.hook == "postrouting" {
		side = 1
	}
	if s.nat && (w.untracked || w.bound[side] || fromNode && (w.hook == "prerouting" || w.hook == "input")) {
		return []result{{w, goOn}}
	}
	before := w
	var out []result
	switch {
	case s.of == k.table:
		out = k.chain(s.base.name, w)
	case s.of != nil:
		out = k.in(s.of).chain(s.base.name, w)
	default:
		out = p.iptables(s.table, w, fromNode)
	}
	for i := range out {
		o := &out[i].way
		if s.nat && (o.dst != before.dst || o.masked != before.masked) {
			o.bound[side] = true
		}
	}
	return out
}

// iptables takes a packet through a built-in chain of iptables. What cannot be
// evaluated is taken not to match.
func (p *Program) iptables(table string, w way, fromNode bool) []result {
	in := xtables.Packet{
		Proto: w.proto.String(), Src: w.src.Addr(), SPort: w.src.Port(), Dst: w.dst.Addr(), DPort: w.dst.Port(),
		In: w.in, Mark: w.mark, State: xtables.StateNew, Masqueraded: w.masked,
		OrigSrc: w.orig[0], OrigDst: w.orig[1],
	}
	if w.picked {
		in.State |= xtables.StateDNAT
	}
	if w.untracked {
		in.State = xtables.StateUntracked
	}
	if w.masked {
		in.State |= xtables.StateSNAT
	}
	var out []result
	for _, l := range p.cfg.Beside.Station(in, xtables.Station{Hook: w.hook, Table: table, Chain: strings.ToUpper(w.hook), If: xtables.Unknown}, fromNode) {
		if slices.ContainsFunc(l.Assumptions, func(a xtables.Assumption) bool { return a.Held }) {
			continue
		}
		for i := range l.Assumptions {
			if a := &l.Assumptions[i]; a.Rule != nil {
				p.unknown[Doubt{w.hook, table, a.Rule.String()}] = true
			}
		}
		one := w
		one.chance *= l.Probability
		one.steps = append(slices.Clip(one.steps), p.cfg.Beside.Steps(l.Steps)...)
		one.mark, one.masked = l.Packet.Mark, l.Packet.Masqueraded
		if l.Packet.State&xtables.StateUntracked != 0 && !one.untracked {
			one.untracked = true
			for i := range one.steps {
				if x := &one.steps[i]; x.Table == "raw" && (strings.Contains(x.Text, "-j NOTRACK") || strings.Contains(x.Text, "-j CT --notrack")) {
					x.Effect = "notrack"
				}
			}
		}
		one.src = netip.AddrPortFrom(l.Packet.Src, l.Packet.SPort)
		if to := netip.AddrPortFrom(l.Packet.Dst, l.Packet.DPort); to != one.dst {
			one.dst, one.picked = to, true
		}
		r := result{one, goOn}
		switch l.Verdict {
		case xtables.Drop, xtables.Reject:
			r.then, r.refused, r.reason = gone, proxy.Drop, "dropped-by-rule"
			if l.Verdict == xtables.Reject {
				r.refused = proxy.Reject
			}
			if n := len(l.Steps); n > 0 && l.Steps[n-1].Rule == nil {
				r.reason = "policy-drop"
				last := &r.steps[len(r.steps)-1]
				last.Effect, last.Purpose = "drop", policyDrops
			}
		case xtables.Accept, xtables.Lost:
		}
		out = append(out, r)
	}
	if out == nil {
		out = []result{{w, goOn}}
	}
	return out
}

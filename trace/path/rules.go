package path

import (
	"fmt"
	"strconv"
	"sync"

	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/proxy/liverules/nftables"
	"github.com/kptrace/kptrace/trace"
)

// Found is a rule of a report.
type Found struct {
	// Rule is nil where it is not known; Later then says that it may be soon, and
	// Note why not.
	Rule  *xtables.Rule
	Later bool
	Note  string
	// Number is the rule's in its chain, Text as iptables-save prints it, Effect
	// as in xtables.Step.
	Number       uint64
	Text, Effect string
	// Native says that Text is nft's, of a table that iptables does not show: there
	// is no Rule then, and Effect is empty unless it translates.
	Native bool
	// Chain are all rules of its chain, Program what they mean.
	Chain   []*xtables.Rule
	Program *liverules.Program
	// End is the number of the chain's end, Policy that of a built-in chain.
	End    uint64
	Policy string
}

// Probability returns the chance with which a rule matches, 0 where it is none.
func (f *Found) Probability() float64 { return chanceOf(f.Rule) }

func chanceOf(r *xtables.Rule) float64 {
	m := r.Match("statistic")
	if m == nil || m.Opt("probability") == nil {
		return 0
	}
	p, err := strconv.ParseFloat(m.Opt("probability").Value(), 64)
	if err != nil {
		return 0
	}
	return p
}

// HandleKey is a rule of nf_tables.
type HandleKey struct {
	Family       uint8
	Table, Chain string
	Handle       uint64
}

// ChainKey is a chain of nf_tables.
type ChainKey struct {
	Family       uint8
	Table, Chain string
}

// Generation is the rules as they were at one time. It must not change.
type Generation struct {
	Source trace.SourceID
	// From is when reading began and To when a later generation was read, in
	// nanoseconds since 1970; 0 while it is the newest.
	From, To int64
	// Rules are the rulesets by family.
	Rules map[uint8]*xtables.Ruleset
	// Index gives the place of each rule of nf_tables in its chain, from 0.
	Index map[HandleKey]int
	// Native are the rules of tables that iptables does not show, Unlisted why some
	// of these could not be read, if so.
	Native   map[HandleKey]nftables.Listed
	Unlisted string
	// Hooks are the hooks of built-in chains with names of their own.
	Hooks map[ChainKey]string
	// Program is what the rules mean.
	Program *liverules.Program
}

// maxGenerations bounds how many are kept.
const maxGenerations = 8

// Rules keeps the last generations. It may be used from several goroutines.
type Rules struct {
	mu   sync.Mutex // guards what follows
	gens []*Generation
	// stale says that a report could not be resolved since the newest was read.
	stale bool
}

// Add makes g the newest generation.
func (r *Rules) Add(g *Generation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.gens); n > 0 {
		r.gens[n-1].To = g.From
	}
	r.gens = append(r.gens, g)
	if len(r.gens) > maxGenerations {
		r.gens = r.gens[1:]
	}
	r.stale = false
}

// Newest returns the newest generation, nil where there is none.
func (r *Rules) Newest() *Generation {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.gens) == 0 {
		return nil
	}
	return r.gens[len(r.gens)-1]
}

// Stale reports whether the newest generation no longer tells everything.
func (r *Rules) Stale() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stale
}

// IPVS reports whether the newest rules are those of a kube-proxy in its IPVS mode.
func (r *Rules) IPVS() bool {
	g := r.Newest()
	return g != nil && g.Program != nil && g.Program.Mode() == proxy.IPVS
}

// Hook tells the hook of a built-in chain with a name of its own.
func (r *Rules) Hook(family uint8, table, chain string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	key := ChainKey{family, table, chain}
	for i := len(r.gens) - 1; i >= 0; i-- {
		if h, ok := r.gens[i].Hooks[key]; ok {
			return h
		}
	}
	return ""
}

// Find finds the rule of a report in the generation that was live then.
func (r *Rules) Find(h *trace.RuleHit) Found {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.gens) == 0 {
		return Found{Later: true}
	}
	if h.Kind == trace.HopRule && h.Handle != 0 {
		return r.byHandle(h)
	}
	g := r.at(h.Time)
	return g.find(h, int(h.Number)-1)
}

// byHandle goes through the generations, for a handle is given only once.
func (r *Rules) byHandle(h *trace.RuleHit) Found {
	key := HandleKey{h.Family, h.Table, h.Chain, h.Handle}
	for i := len(r.gens) - 1; i >= 0; i-- {
		if at, ok := r.gens[i].Index[key]; ok {
			return r.gens[i].find(h, at)
		}
		if l, ok := r.gens[i].Native[key]; ok {
			return Found{Native: true, Number: l.Number, Text: l.Text, Effect: nftables.Effect(l.Text)}
		}
	}
	if newest := r.gens[len(r.gens)-1]; newest.From > h.Time {
		note := fmt.Sprintf("rule %d, which iptables does not show, or which was gone before it could be read", h.Handle)
		if newest.Unlisted != "" {
			note = fmt.Sprintf("rule %d: %s", h.Handle, newest.Unlisted)
		}
		return Found{Note: note}
	}
	r.stale = true
	return Found{Later: true, Note: fmt.Sprintf("rule %d, which is newer than the rules as they were read", h.Handle)}
}

// at returns the generation of a time: the last one whose reading began before.
func (r *Rules) at(t int64) *Generation {
	for i := len(r.gens) - 1; i > 0; i-- {
		if r.gens[i].From <= t {
			return r.gens[i]
		}
	}
	return r.gens[0]
}

// native adds the rules of a table as nft -a lists them.
func (g *Generation) native(text string) {
	if g.Native == nil {
		g.Native = map[HandleKey]nftables.Listed{}
	}
	for _, l := range nftables.List(text) {
		for family, word := range families {
			if word == l.Family {
				g.Native[HandleKey{family, l.Table, l.Chain, l.Handle}] = l
			}
		}
	}
}

// families are nft's words for the families of tables.
var families = map[uint8]string{ //nolint:gochecknoglobals // a table
	1: "inet", nfnl.FamilyIPv4: "ip", 3: "arp", 5: "netdev", nfnl.FamilyBridge: "bridge", nfnl.FamilyIPv6: "ip6",
}

// find takes the rule with an index from 0 in its chain.
func (g *Generation) find(h *trace.RuleHit, at int) Found {
	family := h.Family
	if family == 0 {
		family = nfnl.FamilyIPv4
	}
	t := g.Rules[family].Table(h.Table)
	c := t.Chain(h.Chain)
	if c == nil {
		return Found{Note: fmt.Sprintf("a rule of table %s that iptables does not show", h.Table)}
	}
	f := Found{Chain: c.Rules, Program: g.Program, End: uint64(len(c.Rules) + 1), Policy: c.Policy}
	switch {
	case h.Kind == trace.HopRule:
	case at < 0 || at >= len(c.Rules):
		return f
	default:
		// So iptables-legacy reports a rule that is nothing but a verdict.
	}
	if at < 0 || at >= len(c.Rules) {
		f.Note = "a rule that was changed meanwhile"
		return f
	}
	f.Rule, f.Number = c.Rules[at], uint64(at+1)
	f.Text, f.Effect = f.Rule.String(), t.Effect(f.Rule)
	return f
}

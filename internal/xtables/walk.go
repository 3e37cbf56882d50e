package xtables

import (
	"net/netip"
	"slices"
)

// Verdict is what becomes of a packet at the end of a walk.
type Verdict uint8

// The verdicts.
const (
	// Accept: it passed all stations.
	Accept Verdict = iota
	// Drop: it was dropped.
	Drop
	// Reject: it was dropped and the sender told so.
	Reject
	// Lost: what becomes of it the rules do not say; the last step's Note
	// says why.
	Lost
)

// String returns the verdict in lower case.
func (v Verdict) String() string { return [...]string{"accept", "drop", "reject", "lost"}[v&3] }

// The effects of a step.
const (
	EffectMatch      = "match" // a rule that goes on with the next one
	EffectJump       = "jump"
	EffectGoto       = "goto"
	EffectReturn     = "return"
	EffectPolicy     = "policy"
	EffectAccept     = "accept"
	EffectDrop       = "drop"
	EffectReject     = "reject"
	EffectDNAT       = "dnat"
	EffectSNAT       = "snat"
	EffectMasquerade = "masquerade"
	EffectRedirect   = "redirect"
	EffectUnknown    = "unknown"
)

// Step is a rule that matched, or the end of a chain.
type Step struct {
	Hook, Table, Chain string
	// Index is the rule's number from 1. At a chain's end it is one more than
	// the chain has rules, as TRACE of iptables-legacy counts, and Rule is nil.
	Index  int
	Rule   *Rule
	Effect string
	// Probability is the chance that the rule matched once the packet was
	// there: below 1 for a statistic match.
	Probability           float64
	MarkBefore, MarkAfter uint32
	// DstAfter is the packet's destination after the step.
	DstAfter netip.AddrPort
	// Note says what the walk could not know.
	Note string
}

// Assumption is a match whose outcome the walk could not tell; it tried both.
type Assumption struct {
	Table, Chain string
	Index        int
	Rule         *Rule
	// Matches are the names of the matches in question, and Held whether they
	// were taken to match.
	Matches []string
	Held    bool
	// Question is what was not known of the node, if it was that: then Rule is
	// the first one that depends on it, nil for the way a packet is routed.
	Question Question
	// After is how many steps of the way were before it.
	After int
}

// Leaf is one way a packet can go.
type Leaf struct {
	// Probability is that of this way if the Assumptions hold. Over all leaves
	// without assumptions, or with the same outcome of each, they add up to 1.
	Probability float64
	Assumptions []Assumption
	// Packet is how it leaves.
	Packet  Packet
	Verdict Verdict
	// RejectWith is the answer to the sender for Reject.
	RejectWith string
	Steps      []Step
}

// Walker sends packets through a ruleset. It is immutable.
type Walker struct {
	rules *Ruleset
	index map[*Chain]*chainIndex
}

// The bounds of a walk through a ruleset that loops or doubles endlessly.
const (
	maxDepth       = 64
	maxAssumptions = 6
	maxSteps       = 1 << 12 // of one way
	maxLeaves      = 1 << 14
	maxWork        = 1 << 20 // steps made and copied, of all ways
)

// NewWalker prepares a walker; rs must not change any more.
func NewWalker(rs *Ruleset) *Walker {
	w := &Walker{rules: rs, index: make(map[*Chain]*chainIndex)}
	for _, t := range rs.Tables {
		for _, c := range t.Chains {
			if len(c.Rules) >= indexFrom {
				w.index[c] = newChainIndex(c.Rules)
			}
		}
	}
	return w
}

// Walk sends a packet through stations in order and returns all the ways it can
// go, in the order of the rules that decide. The chains of nat are for packets
// in state NEW only, as in the kernel; for others the caller gives the packet as
// it is after translation. A walk is bounded, for a dump may loop or double
// without end: what exceeds the bounds is Lost, of such leaves only the last step
// is kept.
func (w *Walker) Walk(p Packet, stations []Station, o Oracles) []Leaf {
	if !p.OrigDst.IsValid() {
		p.OrigSrc, p.OrigDst = netip.AddrPortFrom(p.Src, p.SPort), netip.AddrPortFrom(p.Dst, p.DPort)
	}
	walk := &walking{w: w, o: &o, stations: stations}
	walk.run(&branch{p: p, prob: 1, station: -1})
	return walk.leaves
}

type walking struct {
	w        *Walker
	o        *Oracles
	stations []Station
	leaves   []Leaf
	work     int
}

// branch is one way under way.
type branch struct {
	p       Packet
	prob    float64
	station int
	table   *Table
	base    *Chain
	stack   []frame
	steps   *stepNode
	assumed []Assumption
	answers []answer
}

// frame is a chain and the place of the next rule in it.
type frame struct {
	chain *Chain
	at    int
}

// stepNode is a list of steps that branches share.
type stepNode struct {
	step Step
	prev *stepNode
	n    int
}

func (b *branch) fork() *branch {
	c := *b
	c.stack = slices.Clone(b.stack)
	c.assumed = slices.Clip(b.assumed)
	c.answers = slices.Clip(b.answers)
	return &c
}

// length is the number of steps so far.
func (b *branch) length() int {
	if b.steps == nil {
		return 0
	}
	return b.steps.n
}

func (x *walking) run(b *branch) {
	for {
		if len(b.stack) == 0 && !x.enter(b) {
			x.leaf(b, Accept, "")
			return
		}
		f := &b.stack[len(b.stack)-1]
		i := f.at
		if index := x.w.index[f.chain]; index != nil {
			i = index.next(&b.p, i)
		}
		if i < 0 || i >= len(f.chain.Rules) {
			if !x.end(b) {
				return
			}
			continue
		}
		f.at = i + 1
		r := f.chain.Rules[i]
		x.o.answers = b.answers
		out := x.o.evaluate(r, &b.p)
		if out.p == 0 {
			continue
		}
		if b.steps != nil && b.steps.n >= maxSteps || len(x.leaves) >= maxLeaves || x.work >= maxWork {
			x.step(b, f.chain, i, r, EffectUnknown, 1, "the walk is too long")
			x.leaf(b, Lost, "")
			return
		}
		if passive(r) { // whether it matches decides nothing
			note := ""
			if len(out.unknown) > 0 {
				note = noteUnknown
			}
			x.apply(b, i, r, out.p, note)
			continue
		}
		if len(out.unknown) == 0 {
			if !x.maybe(b, i, r, out.p, "") {
				return
			}
			continue
		}
		a := Assumption{Table: b.table.Name, Chain: f.chain.Name, Index: i + 1, Rule: r, After: b.length()}
		if out.ask != (Question{}) { // and then see again
			f.at = i
			a.Question = out.ask
			x.assume(b, a, func(*branch) {})
			continue
		}
		for _, m := range out.unknown {
			a.Matches = append(a.Matches, m.Name)
		}
		if len(b.assumed) < maxAssumptions {
			hit, held := b.fork(), a
			held.Held = true
			hit.assumed = append(hit.assumed, held)
			if x.maybe(hit, i, r, out.p, noteUnknown) {
				x.run(hit)
			}
		}
		b.assumed = append(slices.Clip(b.assumed), a)
	}
}

// assume answers a question with yes on a way of its own, which undo prepares,
// and with no on b. Where too much was assumed already the answer is no.
func (x *walking) assume(b *branch, a Assumption, undo func(*branch)) {
	if len(b.assumed) < maxAssumptions {
		hit, held := b.fork(), a
		held.Held = true
		hit.assumed = append(hit.assumed, held)
		hit.answers = append(hit.answers, answer{a.Question, true})
		undo(hit)
		x.run(hit)
	}
	b.assumed = append(slices.Clip(b.assumed), a)
	b.answers = append(slices.Clip(b.answers), answer{a.Question, false})
}

const noteUnknown = "cannot tell whether it matches"

// maybe applies a rule that matches with the given probability. It returns
// false if b is over; otherwise b goes on.
func (x *walking) maybe(b *branch, i int, r *Rule, prob float64, note string) bool {
	if prob >= 1 {
		return x.apply(b, i, r, 1, note)
	}
	hit := b.fork()
	hit.prob *= prob
	if x.apply(hit, i, r, prob, note) {
		x.run(hit)
	}
	b.prob *= 1 - prob
	return true
}

// passive reports whether a rule changes nothing that a walk follows.
func passive(r *Rule) bool {
	switch r.Target {
	case "", "NFLOG", "LOG", "TRACE", "ULOG", "AUDIT", "TEE", "TCPMSS", "DSCP", "TOS", "ECN", "CLASSIFY",
		"CHECKSUM", "SET", "SECMARK", "CONNSECMARK", "HL", "TTL", "IDLETIMER", "LED", "RATEEST":
		return true
	}
	return false
}

// enter goes to the next station that has a chain for the packet.
func (x *walking) enter(b *branch) bool {
	for b.station++; b.station < len(x.stations); b.station++ {
		s := &x.stations[b.station]
		if s.Route && x.o.Route != nil {
			x.o.Route(&b.p)
		}
		if s.If != Unknown {
			x.o.answers = b.answers
			local := x.o.local(b.p.Dst)
			if local == Unknown {
				local = No
				x.assume(b, Assumption{Table: s.Table, Chain: s.Chain, Question: Question{Local: b.p.Dst}, After: b.length()},
					func(hit *branch) { hit.station-- })
			}
			if local != s.If {
				continue
			}
		}
		if s.Table == "nat" && b.p.State&StateNew == 0 {
			continue
		}
		t := x.w.rules.Table(s.Table)
		if c := t.Chain(s.Chain); c != nil {
			if s.In != "" {
				b.p.In = s.In
			}
			b.table, b.base = t, c
			b.stack = append(b.stack[:0], frame{chain: c})
			return true
		}
	}
	return false
}

// end leaves a chain at its end; it returns false if the branch is over.
func (x *walking) end(b *branch) bool {
	top := b.stack[len(b.stack)-1].chain
	if len(b.stack) > 1 {
		x.step(b, top, len(top.Rules), nil, EffectReturn, 1, "")
		b.stack = b.stack[:len(b.stack)-1]
		return true
	}
	return x.policy(b)
}

func (x *walking) policy(b *branch) bool {
	x.step(b, b.base, len(b.base.Rules), nil, EffectPolicy, 1, "")
	b.stack = b.stack[:0]
	if b.base.Policy == "DROP" {
		x.leaf(b, Drop, "")
		return false
	}
	return true
}

func (x *walking) step(b *branch, c *Chain, i int, r *Rule, effect string, prob float64, note string) *Step {
	n := &stepNode{prev: b.steps, n: 1, step: Step{
		Hook: x.stations[b.station].Hook, Table: b.table.Name, Chain: c.Name, Index: i + 1, Rule: r,
		Effect: effect, Probability: prob, MarkBefore: b.p.Mark, MarkAfter: b.p.Mark,
		DstAfter: netip.AddrPortFrom(b.p.Dst, b.p.DPort), Note: note,
	}}
	if b.steps != nil {
		n.n += b.steps.n
	}
	b.steps = n
	x.work++
	return &n.step
}

func (x *walking) leaf(b *branch, v Verdict, rejectWith string) {
	l := Leaf{Probability: b.prob, Assumptions: b.assumed, Packet: b.p, Verdict: v, RejectWith: rejectWith}
	if last := b.steps; last != nil {
		if x.work += last.n; x.work > maxWork { // the end of the way at least
			l.Steps = []Step{last.step}
		} else {
			l.Steps = make([]Step, last.n)
			for n := last; n != nil; n = n.prev {
				l.Steps[n.n-1] = n.step
			}
		}
	}
	x.leaves = append(x.leaves, l)
}

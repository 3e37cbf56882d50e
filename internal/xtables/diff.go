package xtables

// DiffKind says how a chain stands.
type DiffKind uint8

// The kinds.
const (
	// Same: the chain has the wanted rules in the wanted order.
	Same DiffKind = iota
	// Missing: the chain is wanted and not there. Add has its rules.
	Missing
	// Extra: the chain is there, ours, and not wanted. Remove has its rules.
	Extra
	// Changed: the chain is there with other rules, order or policy.
	Changed
)

// String returns the kind in lower case.
func (k DiffKind) String() string {
	return [...]string{"same", "missing", "extra", "changed"}[k&3]
}

// NumberedRule is a rule and its place in its chain, from 1.
type NumberedRule struct {
	Index int
	Rule  *Rule
}

// ChainDiff is what distinguishes one chain of two rulesets.
type ChainDiff struct {
	Table, Chain string
	Kind         DiffKind
	// Add are the rules wanted and not there, with the place they are wanted
	// in; Remove those there and not wanted, with the place they stand in.
	Add, Remove []NumberedRule
	// Moved says that rules which both have do not stand in the same order.
	Moved bool
	// Policy is the wanted policy where the chain has another one, else "".
	Policy string
}

// Diff compares what is with what should be, chain by chain: all chains of
// want in its order, then the chains only have has for which owned returns true
// (nil owns none). Chains that are the same are listed too. Rules are compared
// by their canonical text, as a multiset; the time is linear in the number of
// rules.
func Diff(have, want *Ruleset, owned func(table, chain string) bool) []ChainDiff {
	var out []ChainDiff
	for _, t := range want.Tables {
		there := have.Table(t.Name)
		for _, w := range t.Chains {
			d := ChainDiff{Table: t.Name, Chain: w.Name}
			if h := there.Chain(w.Name); h == nil {
				d.Kind, d.Add = Missing, numbered(w.Rules)
			} else {
				d.compare(h, w)
			}
			out = append(out, d)
		}
	}
	if owned == nil {
		return out
	}
	for _, t := range have.Tables {
		wanted := want.Table(t.Name)
		for _, h := range t.Chains {
			if wanted.Chain(h.Name) == nil && owned(t.Name, h.Name) {
				out = append(out, ChainDiff{Table: t.Name, Chain: h.Name, Kind: Extra, Remove: numbered(h.Rules)})
			}
		}
	}
	return out
}

func numbered(rules []*Rule) []NumberedRule {
	out := make([]NumberedRule, len(rules))
	for i, r := range rules {
		out[i] = NumberedRule{Index: i + 1, Rule: r}
	}
	return out
}

// compare fills d with what turns h into w.
func (d *ChainDiff) compare(h, w *Chain) {
	if w.Policy != "" && h.Policy != "" && w.Policy != h.Policy {
		d.Policy = w.Policy
	}
	have, want, skip := h.Rules, w.Rules, 0
	for len(have) > 0 && len(want) > 0 && have[0].Equal(want[0]) {
		have, want, skip = have[1:], want[1:], skip+1
	}
	for len(have) > 0 && len(want) > 0 && have[len(have)-1].Equal(want[len(want)-1]) {
		have, want = have[:len(have)-1], want[:len(want)-1]
	}
	if len(have) > 0 || len(want) > 0 {
		d.multiset(have, want, skip)
	}
	if d.Policy != "" || d.Moved || len(d.Add) > 0 || len(d.Remove) > 0 {
		d.Kind = Changed
	}
}

func (d *ChainDiff) multiset(have, want []*Rule, skip int) {
	// For each text the places in have that no rule of want has claimed yet,
	// as a list threaded through next: a chain with one rule a thousand times
	// is no harder than others.
	type places struct{ head, tail int }
	at := make(map[string]places, len(have))
	next := make([]int, len(have))
	for i, r := range have {
		text := r.String()
		next[i] = -1
		if p, ok := at[text]; ok && p.head >= 0 {
			next[p.tail] = i
			p.tail = i
			at[text] = p
		} else {
			at[text] = places{i, i}
		}
	}
	kept := make([]bool, len(have))
	last := -1
	for i, r := range want {
		text := r.String()
		p, ok := at[text]
		if !ok || p.head < 0 {
			d.Add = append(d.Add, NumberedRule{Index: skip + i + 1, Rule: r})
			continue
		}
		kept[p.head] = true
		if p.head < last {
			d.Moved = true
		}
		last = max(last, p.head)
		p.head = next[p.head]
		at[text] = p
	}
	for i, r := range have {
		if !kept[i] {
			d.Remove = append(d.Remove, NumberedRule{Index: skip + i + 1, Rule: r})
		}
	}
}

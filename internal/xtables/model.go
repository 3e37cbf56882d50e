package xtables

import (
	"net/netip"
	"slices"
)

// Family is the address family of a ruleset: iptables or ip6tables.
type Family uint8

// The families.
const (
	IPv4 Family = iota
	IPv6
)

// String returns "ipv4" or "ipv6".
func (f Family) String() string {
	if f == IPv6 {
		return "ipv6"
	}
	return "ipv4"
}

func (f Family) bits() int {
	if f == IPv6 {
		return 128
	}
	return 32
}

// Addr is a source or destination match (-s, -d). The zero value matches
// everything and is not printed.
type Addr struct {
	// Prefix is the masked network.
	Prefix netip.Prefix
	// Text stands in for Prefix where the argument is none: a mask with
	// holes, or a host name.
	Text string
	// Not inverts the match.
	Not bool
}

// Host returns the match for one address.
func Host(a netip.Addr) Addr { return Addr{Prefix: netip.PrefixFrom(a, a.BitLen())} }

// Net returns the match for a network.
func Net(p netip.Prefix) Addr { return Addr{Prefix: p.Masked()} }

// IsZero reports whether the match is absent.
func (a Addr) IsZero() bool { return !a.Prefix.IsValid() && a.Text == "" }

// Iface is an interface match (-i, -o). A Name ending in + matches every
// interface that begins so.
type Iface struct {
	Name string
	Not  bool
}

// Proto is a protocol match (-p), by the name iptables-save prints ("tcp",
// "udp", "sctp", "icmp", "ipv6-icmp", …) or the number where there is none.
type Proto struct {
	Name string
	Not  bool
}

// Opt is one option of a match or target.
type Opt struct {
	// Name is without the leading dashes.
	Name string
	// Values are the arguments, unquoted; most options have one.
	Values []string
	// Not is a leading "!".
	Not bool
	// Quoted says that the arguments are printed in double quotes.
	Quoted bool
}

// Value returns the first argument, or "".
func (o *Opt) Value() string {
	if len(o.Values) == 0 {
		return ""
	}
	return o.Values[0]
}

// Match is one -m with its options.
type Match struct {
	Name string
	Opts []Opt
}

// Opt returns the named option, or nil.
func (m *Match) Opt(name string) *Opt { return findOpt(m.Opts, name) }

func findOpt(opts []Opt, name string) *Opt {
	for i := range opts {
		if opts[i].Name == name {
			return &opts[i]
		}
	}
	return nil
}

// Counters are what the kernel counted for a rule or a chain's policy. They
// are no part of what a rule is.
type Counters struct {
	Packets, Bytes uint64
}

// Rule is one rule, without the chain it stands in.
type Rule struct {
	Src, Dst Addr
	In, Out  Iface
	Proto    Proto
	// Matches are in the order in which they are evaluated.
	Matches []Match
	// Target is what follows -j or -g: a verdict, an extension, a chain, or
	// "" for a rule that only counts.
	Target string
	// TargetOpts are the target's options.
	TargetOpts []Opt
	Counters   Counters
	// Goto says -g instead of -j.
	Goto bool
	// Frag is -f: "" for none, "-f", or "! -f".
	Frag string
	// Family decides what is default and need not be written.
	Family Family

	canonical bool
}

// Match returns the first match of that name, or nil.
func (r *Rule) Match(name string) *Match {
	for i := range r.Matches {
		if r.Matches[i].Name == name {
			return &r.Matches[i]
		}
	}
	return nil
}

// Comment returns the text of the first comment match, or "".
func (r *Rule) Comment() string {
	if m := r.Match("comment"); m != nil {
		if o := m.Opt("comment"); o != nil {
			return o.Value()
		}
	}
	return ""
}

// TargetOpt returns the first argument of a target's option, and whether the
// option is there.
func (r *Rule) TargetOpt(name string) (string, bool) {
	if o := findOpt(r.TargetOpts, name); o != nil {
		return o.Value(), true
	}
	return "", false
}

// Equal reports whether a and b are the same rule; counters do not matter.
func (r *Rule) Equal(o *Rule) bool {
	if !r.canonical {
		r = r.canon()
	}
	if !o.canonical {
		o = o.canon()
	}
	return r.Src == o.Src && r.Dst == o.Dst && r.In == o.In && r.Out == o.Out &&
		r.Proto == o.Proto && r.Target == o.Target && r.Goto == o.Goto && r.Frag == o.Frag &&
		slices.EqualFunc(r.Matches, o.Matches, func(a, b Match) bool {
			return a.Name == b.Name && equalOpts(a.Opts, b.Opts)
		}) && equalOpts(r.TargetOpts, o.TargetOpts)
}

func equalOpts(a, b []Opt) bool {
	return slices.EqualFunc(a, b, func(a, b Opt) bool {
		return a.Name == b.Name && a.Not == b.Not && a.Quoted == b.Quoted && slices.Equal(a.Values, b.Values)
	})
}

// Chain is an ordered list of rules.
type Chain struct {
	Name string
	// Policy is ACCEPT or DROP for a built-in chain and "-" for a user's. It
	// is "" for a chain that a text names without declaring it.
	Policy   string
	Rules    []*Rule
	Counters Counters
}

// Add appends rules.
func (c *Chain) Add(rules ...*Rule) { c.Rules = append(c.Rules, rules...) }

// Table is an ordered list of chains.
type Table struct {
	Name   string
	Chains []*Chain

	index map[string]*Chain
}

// Chain returns the named chain, or nil. A nil Table has no chains.
func (t *Table) Chain(name string) *Chain {
	if t == nil {
		return nil
	}
	return t.index[name]
}

// Ensure returns the named chain, appending it with the given policy if the
// table lacks it.
func (t *Table) Ensure(name, policy string) *Chain {
	if c := t.index[name]; c != nil {
		return c
	}
	c := &Chain{Name: name, Policy: policy}
	if t.index == nil {
		t.index = make(map[string]*Chain)
	}
	t.index[name] = c
	t.Chains = append(t.Chains, c)
	return c
}

// Ruleset is what iptables-save prints: the tables of one family.
type Ruleset struct {
	Family Family
	Tables []*Table
}

// Table returns the named table, or nil.
func (rs *Ruleset) Table(name string) *Table {
	if rs == nil {
		return nil
	}
	for _, t := range rs.Tables {
		if t.Name == name {
			return t
		}
	}
	return nil
}

// Ensure returns the named table, appending it if it is not there.
func (rs *Ruleset) Ensure(name string) *Table {
	if t := rs.Table(name); t != nil {
		return t
	}
	t := &Table{Name: name}
	rs.Tables = append(rs.Tables, t)
	return t
}

// Chain returns the chain of a table, or nil.
func (rs *Ruleset) Chain(table, chain string) *Chain { return rs.Table(table).Chain(chain) }

// Rules returns the number of rules in all tables.
func (rs *Ruleset) Rules() int {
	n := 0
	for _, t := range rs.Tables {
		for _, c := range t.Chains {
			n += len(c.Rules)
		}
	}
	return n
}

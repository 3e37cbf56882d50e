package xtables

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"time"
)

// Unit is a group of lines for one table that are committed together or not at
// all, so it should be small: in a user namespace iptables-nft refuses one of more
// than about 300 rules. A unit may name chains that it makes itself, or that units
// before it in the plan make.
type Unit struct {
	// Table is the table the lines are for.
	Table string
	// Owner says for whom, such as "shop/foo:http"; it names the culprit when
	// the kernel refuses a line.
	Owner string
	// Chains are written as a whole: made or emptied, and filled. They come
	// before Lines.
	Chains []ChainText
	// Lines are as iptables-restore reads them (":CHAIN - [0:0]", "-A …",
	// "-X …"), without newline. A line that declares a chain also empties it.
	Lines []string
	// Make, if set, makes Chains and Lines, which are then empty, each time they
	// are written, so that those of a large plan are never in memory together
	// and are made while iptables-restore is at work. It gives the same each
	// time, the chains without their rules if those are not asked for, and may
	// be called from any goroutine. About is its size in bytes, more or less.
	Make  func(rules bool) (chains []ChainText, lines []string)
	About int
}

// ChainText is a chain and its rules, as what stands behind "-A NAME". It refers
// to text that others hold anyway: 160,000 rules are not copied to be written.
type ChainText struct {
	Name  string
	Rules []string
}

// The lines of a ChainText are these around its name and each rule.
const (
	declare    = ":"
	declareEnd = " - [0:0]"
	appendTo   = "-A "
)

// bytes is about the length of the unit's text.
func (u *Unit) bytes() int {
	if u.Make != nil {
		return u.About
	}
	n := 0
	for i := range u.Chains {
		c := &u.Chains[i]
		n += len(declare) + len(c.Name) + len(declareEnd) + 1
		for _, r := range c.Rules {
			n += len(appendTo) + len(c.Name) + 1 + len(r) + 1
		}
	}
	for _, l := range u.Lines {
		n += len(l) + 1
	}
	return n
}

// written counts lines, and those among them that add a rule.
type written struct{ lines, rules int }

// write writes the lines of one pass.
func (u *Unit) write(b *bytes.Buffer, p pass) (n written) {
	chains, lines := u.Chains, u.Lines
	if u.Make != nil {
		chains, lines = u.Make(p == passRules)
	}
	for i := range chains {
		c := &chains[i]
		if p == passChains {
			b.WriteString(declare)
			b.WriteString(c.Name)
			b.WriteString(declareEnd)
			b.WriteByte('\n')
			n.lines++
			continue
		}
		for _, r := range c.Rules {
			b.WriteString(appendTo)
			b.WriteString(c.Name)
			b.WriteByte(' ')
			b.WriteString(r)
			b.WriteByte('\n')
		}
		n.lines, n.rules = n.lines+len(c.Rules), n.rules+len(c.Rules)
	}
	for _, l := range lines {
		if strings.HasPrefix(l, declare) == (p == passChains) {
			b.WriteString(l)
			b.WriteByte('\n')
			n.lines++
			if strings.HasPrefix(l, appendTo) || strings.HasPrefix(l, "-I ") {
				n.rules++
			}
		}
	}
	return n
}

// line returns a line by its number among those of its passes, "" beyond.
func (u *Unit) line(n int, passes ...pass) string {
	var b bytes.Buffer
	for _, p := range passes {
		u.write(&b, p)
	}
	for l := range strings.Lines(b.String()) {
		if n == 0 {
			return strings.TrimSuffix(l, "\n")
		}
		n--
	}
	return ""
}

// Phase is a list of units that may be committed together, in their order. All
// of a phase is in the kernel before the next one begins. A chain belongs to one
// unit of a phase: two that declare it, or one that declares and one that deletes
// it, would undo each other depending on how they are packed.
type Phase struct {
	Name  string
	Units []Unit
}

// Plan is a list of phases, in order.
type Plan []Phase

// Text returns the plan as one text for iptables-restore --noflush, with a
// comment line before each phase: what a dry run prints.
func (p Plan) Text() string {
	var b strings.Builder
	for _, ph := range p {
		if len(ph.Units) == 0 {
			continue
		}
		fmt.Fprintf(&b, "# %s\n", ph.Name)
		for i := 0; i < len(ph.Units); {
			j := i
			for j < len(ph.Units) && ph.Units[j].Table == ph.Units[i].Table {
				j++
			}
			_, _ = io.Copy(&b, &text{blocks: [][]Unit{ph.Units[i:j]}}) // neither fails
			i = j
		}
	}
	return b.String()
}

// Report says what Apply did.
type Report struct {
	// Commits, Bytes, Units and Rules count what the kernel took; Rules are
	// the lines that append or insert a rule.
	Commits, Bytes, Units, Rules int
	// Tables counts the Rules by table.
	Tables map[string]int
	// Runs is how often iptables-restore was started, failures included.
	Runs int
	// Duration is the time it all took; LockWait the part of it that was spent
	// waiting for another iptables, as far as the program said so.
	Duration, LockWait time.Duration
	// Failed are the units the kernel refused. All others are applied.
	Failed []UnitError
}

// UnitError is a unit that iptables-restore or the kernel refused.
type UnitError struct {
	Table, Owner string
	// Phase and Index say where the unit stands in the plan.
	Phase string
	Index int
	// Line is the line at fault, or "" where the program did not say.
	Line string
	// Stderr is what the program said.
	Stderr string
}

// Error names the owner, the line and what the program said.
func (e *UnitError) Error() string {
	msg := fmt.Sprintf("xtables: %s in table %s", e.Owner, e.Table)
	if e.Line != "" {
		msg += fmt.Sprintf(": line %q", e.Line)
	}
	return msg + ": " + strings.Join(strings.Fields(e.Stderr), " ")
}

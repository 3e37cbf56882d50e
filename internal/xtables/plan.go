package xtables

import (
	"fmt"
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
	// Lines are as iptables-restore reads them (":CHAIN - [0:0]", "-A …",
	// "-X …"), without newline. A line that declares a chain also empties it.
	Lines []string
}

func (u *Unit) bytes() int {
	n := 0
	for _, l := range u.Lines {
		n += len(l) + 1
	}
	return n
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
			writeBlock(&b, ph.Units[i:j])
			i = j
		}
	}
	return b.String()
}

// writeBlock writes units of one table as one commit.
func writeBlock(b *strings.Builder, units []Unit) {
	b.WriteByte('*')
	b.WriteString(units[0].Table)
	b.WriteByte('\n')
	// Declarations first: with --noflush a line that declares a chain also
	// empties it, so this does not change what the block means, and units may
	// then name each other's chains.
	for i := range units {
		for _, l := range units[i].Lines {
			if strings.HasPrefix(l, ":") {
				b.WriteString(l)
				b.WriteByte('\n')
			}
		}
	}
	for i := range units {
		for _, l := range units[i].Lines {
			if !strings.HasPrefix(l, ":") {
				b.WriteString(l)
				b.WriteByte('\n')
			}
		}
	}
	b.WriteString("COMMIT\n")
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

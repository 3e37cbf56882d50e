package xtables

import (
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

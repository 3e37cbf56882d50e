package lab

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	shown "github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/trace"
)

// Explained is a connection of which kptrace said that it failed, or why.
type Explained struct {
	Began         time.Time
	Reason, Cause string
	// Pod ("NAMESPACE/NAME") is the endpoint whose try failed, of a connection that
	// reached another one; empty if it is the connection that failed.
	Pod string
	// Line is all that was said.
	Line string
}

// ReadExplained reads what kptrace follow -o jsonl prints. Of a connection that
// came to an endpoint in the end each try that failed counts.
func ReadExplained(jsonl string) ([]Explained, error) {
	var list []Explained
	for line := range strings.Lines(jsonl) {
		var f shown.FlowJSON
		if err := json.Unmarshal([]byte(line), &f); err != nil {
			return nil, fmt.Errorf("lab: %w: %s", err, line)
		}
		if f.Outcome.Failed() || f.Reason != "" {
			list = append(list, Explained{f.Time, string(f.Reason), f.Cause, "", strings.TrimSpace(line)})
			continue
		}
		for i := range f.Attempts {
			if a := &f.Attempts[i]; a.Reason != "" && a.Time != nil {
				list = append(list, Explained{*a.Time, string(a.Reason), a.Cause, f.Service.Namespace + "/" + a.Pod, strings.TrimSpace(line)})
			}
		}
	}
	return list, nil
}

// Matrix says of incidents under which reasons kptrace showed the connections that
// failed.
type Matrix struct {
	// Setup says where: "nft", "beside upstream, nftables".
	Setup string
	Rows  []MatrixRow
}

// MatrixRow is one incident; without a Fault it is the time after all.
type MatrixRow struct {
	Fault string
	Want  trace.Reason
	// Also counts as right, too.
	Also trace.Reason
	// Seen counts connections by reason; vague ones with what they say beside it.
	Seen map[string]int
	// example is a connection for each reason.
	example map[string]string
}

// settled is how long after the begin of a connection all is known of it, as a rule.
const settled = 2 * time.Second

// Judge makes an incident's row of what was shown.
func (in *Incident) Judge(list []Explained) MatrixRow {
	row := MatrixRow{Fault: in.Name, Want: in.Reason, Also: in.Also, Seen: map[string]int{}, example: map[string]string{}}
	for _, x := range list {
		if time.Since(x.Began) < max(settled, in.Late) {
			continue
		}
		switch {
		case x.Pod == "":
		case in.Name == "": // it came to an endpoint
			continue
		case len(in.at) > 0 && !slices.Contains(in.at, x.Pod):
			x.Reason += " at " + x.Pod
		}
		if vague(x.Reason) && x.Cause != "" && x.Reason != string(in.Reason) {
			x.Reason += " (" + x.Cause + ")"
		}
		row.Seen[x.Reason]++
		row.example[x.Reason] = x.Line
	}
	return row
}

func (r *MatrixRow) all() (n int) {
	for _, k := range r.Seen {
		n += k
	}
	return n
}

func (r *MatrixRow) right() int {
	n := r.Seen[string(r.Want)]
	if r.Also != "" {
		n += r.Seen[string(r.Also)]
	}
	return n
}

// Enough reports whether there is enough to judge, and it is good.
func (r *MatrixRow) Enough() bool {
	n := r.all()
	return n >= 3 && float64(r.right()) >= 0.95*float64(n)
}

// Doubts lists a connection for each reason that was not the right one.
func (r *MatrixRow) Doubts() (list []string) {
	for _, reason := range slices.Sorted(maps.Keys(r.Seen)) {
		if reason != string(r.Want) {
			list = append(list, r.example[reason])
		}
	}
	return list
}

// vague are reasons that say what was seen and no cause: not right where the cause
// is another one, but not wrong either.
func vague(reason string) bool {
	reason, _, _ = strings.Cut(reason, " ")
	return slices.Contains([]string{"", "syn-unanswered", "no-reply", "dropped-on-node"}, reason)
}

// Right counts the connections with the right reason, and all.
func (m *Matrix) Right() (right, all int) {
	for i := range m.Rows {
		if r := &m.Rows[i]; r.Fault != "" {
			right, all = right+r.right(), all+r.all()
		}
	}
	return right, all
}

// Wrong lists what must not be: an incident that no connection tells of, a wrong
// reason, failures without a fault, less than 95 % right.
func (m *Matrix) Wrong() (list []string) {
	for i := range m.Rows {
		r := &m.Rows[i]
		if r.Fault != "" && r.Seen[string(r.Want)] == 0 {
			list = append(list, fmt.Sprintf("%s: no connection failed for %s: %v", r.Fault, r.Want, r.Seen))
		}
		for _, reason := range slices.Sorted(maps.Keys(r.Seen)) {
			switch {
			case r.Fault == "":
				list = append(list, fmt.Sprintf("without a fault %d connections: %q; one is %s", r.Seen[reason], reason, r.example[reason]))
			case reason != string(r.Want) && reason != string(r.Also) && !vague(reason):
				list = append(list, fmt.Sprintf("%s: %d connections are said to have failed for %s, and it was %s; one is %s", r.Fault, r.Seen[reason], reason, r.Want, r.example[reason]))
			}
		}
	}
	if right, all := m.Right(); float64(right) < 0.95*float64(all) {
		list = append(list, fmt.Sprintf("only %d of %d reasons are right", right, all))
	}
	return list
}

// String is the matrix as a table.
func (m *Matrix) String() string {
	right, all := m.Right()
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %d of %d connections have the right reason\n%-12s %-22s %s\n", m.Setup, right, all, "FAULT", "CAUSE", "SEEN")
	for i := range m.Rows {
		r := &m.Rows[i]
		if r.Fault == "" {
			fmt.Fprintf(&b, "%-12s %-22s %d failed\n", "(none)", "-", r.all())
			continue
		}
		fmt.Fprintf(&b, "%-12s %-22s", r.Fault, r.Want)
		for _, reason := range slices.Sorted(maps.Keys(r.Seen)) {
			fmt.Fprintf(&b, " %s: %d;", reason, r.Seen[reason])
		}
		b.WriteString("\n")
	}
	return b.String()
}

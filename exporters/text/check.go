package text

import (
	"fmt"
	"io"
	"strings"

	"github.com/kptrace/kptrace/trace/check"
)

// Check writes findings for people, the worst first; evidence too if verbose.
func Check(w io.Writer, fs []check.Finding, verbose bool) error {
	var b strings.Builder
	count := map[check.Severity]int{}
	for i := range fs {
		f := &fs[i]
		count[f.Severity]++
		fmt.Fprintf(&b, "%-7s %s  %s: %s\n", strings.ToUpper(string(f.Severity)), f.Code, f.Object, f.Message)
		if f.Fix != "" {
			fmt.Fprintf(&b, "        fix: %s\n", f.Fix)
		}
		if verbose {
			for _, e := range f.Evidence {
				fmt.Fprintf(&b, "        | %s\n", e)
			}
		}
	}
	if len(fs) > 0 {
		fmt.Fprintf(&b, "\n%s: %d break traffic, %d are a risk, %d to note\n", plural(len(fs), "finding"),
			count[check.Breaks], count[check.Risk], count[check.Note])
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// CheckJSON is a check as -o json prints it.
type CheckJSON struct {
	SchemaVersion int             `json:"schemaVersion"`
	Node          string          `json:"node,omitempty"`
	Broken        bool            `json:"broken"`
	Findings      []check.Finding `json:"findings"`
}

// ToCheckJSON converts findings.
func ToCheckJSON(node string, fs []check.Finding) CheckJSON {
	if fs == nil {
		fs = []check.Finding{}
	}
	return CheckJSON{SchemaVersion: SchemaVersion, Node: node, Broken: check.Broken(fs), Findings: fs}
}

package text

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/kptrace/kptrace/trace/check/diagnose"
)

// Diagnose writes a diagnosis for people: the findings that explain most first.
func Diagnose(w io.Writer, service string, since time.Time, r *diagnose.Report) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s since %s, %d failed", service, plural(r.Total, "connection"), since.Local().Format("15:04:05"), r.Failed)
	if r.Incomplete > 0 {
		fmt.Fprintf(&b, " (events were lost during %d)", r.Incomplete)
	}
	b.WriteByte('\n')
	for i := range r.Findings {
		f := &r.Findings[i]
		fmt.Fprintf(&b, "\n%d. %s\n", i+1, f.Text)
		if f.Next != "" {
			fmt.Fprintf(&b, "   look at: %s\n", f.Next)
		}
		if len(f.Flows) > 0 {
			fmt.Fprintf(&b, "   for one: kptrace show %s\n", f.Flows[0])
		}
	}
	for i := range r.Noticed {
		n := &r.Noticed[i]
		fmt.Fprintf(&b, "\n%s\n   look at: %s\n   for one: kptrace show %s\n", n.Text, n.Next, n.Flow)
	}
	if len(r.Check) > 0 {
		b.WriteString("\nkptrace check says of the node:\n")
		for i := range r.Check {
			fmt.Fprintf(&b, "  %-7s %s  %s: %s\n", strings.ToUpper(string(r.Check[i].Severity)), r.Check[i].Code, r.Check[i].Object, r.Check[i].Message)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// Summary writes a table of counts.
func Summary(w io.Writer, by []diagnose.By, rows []diagnose.Row) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, d := range by {
		fmt.Fprintf(tw, "%s\t", strings.ToUpper(string(d)))
	}
	fmt.Fprintln(tw, "CONNECTIONS\tFAILED\tOUTCOMES")
	for i := range rows {
		r := &rows[i]
		for _, v := range r.Values {
			if v == "" {
				v = "-"
			}
			fmt.Fprintf(tw, "%s\t", v)
		}
		var outcomes []string
		for o, n := range r.Outcomes {
			outcomes = append(outcomes, fmt.Sprintf("%d %s", n, o))
		}
		slices.Sort(outcomes)
		fmt.Fprintf(tw, "%d\t%d (%s)\t%s\n", r.Connections, r.Failed, percent(float64(r.Failed)/float64(max(1, r.Connections))), strings.Join(outcomes, ", "))
	}
	return tw.Flush()
}

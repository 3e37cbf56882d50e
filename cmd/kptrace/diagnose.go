package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/check"
	"github.com/kptrace/kptrace/trace/check/diagnose"
)

// diagnoseFlags are the flags of kptrace diagnose.
type diagnoseFlags struct {
	namespace string
	since     string
	output    string
	sockets   []string
}

func newDiagnoseCmd() *cobra.Command {
	var f diagnoseFlags
	cmd := &cobra.Command{
		Use:   "diagnose svc/NAME",
		Short: "Say what the failures of a Service have in common",
		Long: `Say what the failed connections to a Service have in common: for which reason
they failed, and which endpoint, client or node they share that good connections
do not. Findings are ranked by how many failures they explain. What kptrace check
finds on the same nodes stands beside them.

It asks the history of the nodes that run here; kptrace status says how far it
reaches back. The table under it: kptrace follow svc/NAME --summary --by backend,reason.

Exit codes: 0 if nothing failed, 1 for an error, 2 for wrong usage, 3 if something did.`,
		Example: `  # What is wrong with a Service?
  kptrace diagnose svc/foo -n shop

  # In the last ten minutes, for scripts
  kptrace diagnose svc/foo -n shop --since 10m -o json | jq -r '.findings[0].text'`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageErr(errors.New("which Service? give svc/NAME"))
			}
			return nil
		},
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return []string{"svc/"}, cobra.ShellCompDirectiveNoSpace | cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error { return f.run(cmd, args[0]) },
	}
	fl := cmd.Flags()
	fl.StringVarP(&f.namespace, "namespace", "n", cmp.Or(os.Getenv("KPTRACE_NAMESPACE"), "default"), "namespace of the Service ($KPTRACE_NAMESPACE)")
	fl.StringVar(&f.since, "since", "1h", "only connections that began at most this long ago (10m), or since a time (RFC 3339)")
	fl.StringVarP(&f.output, "output", "o", "text", "text or json")
	addSocketFlag(cmd, &f.sockets)
	completeFrom(cmd, "output", []string{"text", "json"})
	return cmd
}

func (f *diagnoseFlags) run(cmd *cobra.Command, resource string) error {
	if err := textOrJSON(f.output); err != nil {
		return err
	}
	sel, err := trace.ParseResource(resource, f.namespace)
	if err != nil {
		return usageErr(err)
	}
	if sel.Kind != trace.SelectService {
		return usageErr(fmt.Errorf("%s is no Service: use svc/NAME", resource))
	}
	since, err := parseSince(f.since, time.Now())
	if err != nil {
		return usageErr(err)
	}
	clients, err := connect(cmd.Context(), f.sockets, false, cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	defer closeAll(clients)
	req := trace.Request{Since: since, Filter: trace.Filter{Resources: []trace.Selector{sel}}}
	flows, from, err := held(cmd.Context(), clients, req)
	if err != nil {
		return err
	}
	var findings []check.Finding
	for _, c := range clients {
		r, err := c.Check(cmd.Context(), relay.CheckRequest{})
		if err != nil {
			fmt.Fprintln(cmd.ErrOrStderr(), "note: not checked:", err)
			continue
		}
		findings = append(findings, r.Findings...)
	}
	report := diagnose.Diagnose(flows, findings)
	if f.output == "json" {
		err = printJSON(cmd.OutOrStdout(), struct {
			SchemaVersion int       `json:"schemaVersion"`
			Service       string    `json:"service"`
			Since         time.Time `json:"since"`
			diagnose.Report
		}{1, sel.Namespace + "/" + sel.Name, latest(since, from).UTC(), report})
	} else {
		err = text.Diagnose(cmd.OutOrStdout(), sel.Namespace+"/"+sel.Name, latest(since, from), &report)
	}
	if err == nil && (report.Failed > 0 || check.Broken(report.Check)) {
		err = &exitCodeError{code: exitProblem}
	}
	return err
}

// held gets the flows that nodes hold, and the time from which they hold all
// failed ones.
func held(ctx context.Context, clients []*relay.Client, req trace.Request) (flows []*trace.Flow, from time.Time, err error) {
	var errs []error
	for _, c := range clients {
		errs = append(errs, c.Flows(ctx, req, func(m trace.Message) error {
			if m.Header != nil {
				from = latest(from, m.Header.FailuresSince)
			}
			if m.Flow != nil && !m.Gone {
				flows = append(flows, m.Flow)
			}
			return nil
		}))
	}
	slices.SortFunc(flows, trace.CompareFlows)
	return flows, from, verdict(errs)
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// summaryBy reads --by.
func summaryBy(words []string) ([]diagnose.By, error) {
	var by []diagnose.By
	for _, w := range words {
		if !slices.Contains(diagnose.Bys(), diagnose.By(w)) {
			var all []string
			for _, b := range diagnose.Bys() {
				all = append(all, string(b))
			}
			return nil, fmt.Errorf("--by: unknown word %q: use %s", w, strings.Join(all, ", "))
		}
		by = append(by, diagnose.By(w))
	}
	return by, nil
}

// summarise prints a table of what nodes hold instead of connections.
func summarise(ctx context.Context, w io.Writer, clients []*relay.Client, req trace.Request, words []string, output string) error {
	by, err := summaryBy(words)
	if err != nil {
		return usageErr(err)
	}
	if req.Since.IsZero() && req.Last == 0 {
		req.Since = time.Unix(1, 0) // all there is
	}
	flows, _, err := held(ctx, clients, req)
	if err != nil {
		return err
	}
	rows := diagnose.Summary(flows, by)
	if output == "json" || output == "jsonl" {
		return printJSON(w, map[string]any{"schemaVersion": 1, "by": by, "rows": rows})
	}
	return text.Summary(w, by, rows)
}

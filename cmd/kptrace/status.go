package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/internal/features"
	"github.com/kptrace/kptrace/internal/netns"
)

func newStatusCmd() *cobra.Command {
	var output string
	var kernel bool
	var sockets []string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Say what runs here, and what this kernel can do",
		Long: `Say what runs here: the proxy's mode and last sync, objects it could not use,
what each source has read and lost, how far back the history goes, what was
changed on the node, and how full conntrack is.

With --kernel: what this kernel and this user can do, found by doing it in
namespaces that vanish again. Nothing needs to run for that.

Exit codes: 0, 1 if nothing runs here, or with --kernel if something that
kptrace must have is missing, 2 for wrong usage.`,
		Example: `  # All nodes that run here
  kptrace status

  # One node, for scripts
  kptrace status --socket /run/kptrace/kptrace.sock -o json

  # Would kptrace work on this machine?
  kptrace status --kernel`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := textOrJSON(output); err != nil {
				return err
			}
			if kernel {
				return kernelStatus(cmd, output)
			}
			clients, err := connect(cmd.Context(), sockets, false, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			defer closeAll(clients)
			var nodes []statusJSON
			for i, c := range clients {
				s, err := c.Status(cmd.Context())
				if err != nil {
					return err
				}
				if output == "json" {
					nodes = append(nodes, toStatusJSON(s, c.Socket()))
					continue
				}
				if i > 0 {
					fmt.Fprintln(cmd.OutOrStdout())
				}
				if err := printStatus(cmd.OutOrStdout(), s, c.Socket(), time.Now()); err != nil {
					return err
				}
			}
			if output == "json" {
				return printJSON(cmd.OutOrStdout(), map[string]any{"schemaVersion": 1, "nodes": nodes})
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	cmd.Flags().BoolVar(&kernel, "kernel", false, "what this kernel and this user can do")
	addSocketFlag(cmd, &sockets)
	completeFrom(cmd, "output", []string{"text", "json"})
	return cmd
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// printStatus writes what a node says of itself.
func printStatus(w io.Writer, s *relay.Status, socket string, now time.Time) error {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-10s %s\n", name, fmt.Sprintf(format, args...))
	}
	ago := func(t time.Time) string {
		if t.IsZero() {
			return "never"
		}
		return fmt.Sprintf("%s (%s ago)", t.Local().Format("2006-01-02 15:04:05"), text.Duration(max(0, now.Sub(t))))
	}
	line("node", "%s, kptrace %s, pid %d, started %s", s.Node, s.Version, s.PID, ago(s.Started))
	line("socket", "%s", socket)
	mode := string(s.Mode)
	if s.Flavour != "" {
		mode += fmt.Sprintf(", iptables-%s (%s)", s.Flavour, s.FlavourReason)
	}
	line("mode", "%s", mode)
	if s.State != "" {
		line("state", "%s", s.State)
	}
	for _, n := range s.StateNotes {
		line("", "%s", n)
	}
	line("synced", "%s: %d rules for %d Service ports with %d endpoints", ago(s.Synced), s.Rules, s.Services, s.Endpoints)
	if s.SyncError != "" {
		line("", "failing since: %s", s.SyncError)
	}
	for i, p := range s.Problems {
		line(first(i, "problems"), "%s", p.Error())
	}
	for i, k := range s.Skipped {
		line(first(i, "left out"), "Service %s/%s: %s", k.Namespace, k.Name, k.Reason)
	}
	for i, src := range s.Sources {
		t := fmt.Sprintf("%-10s %d events in %d reads, %d lost, %d overruns", src.Source, src.Events, src.Frames, src.Lost, src.Overruns)
		if src.Foreign > 0 {
			t += fmt.Sprintf(", %d not ours", src.Foreign)
		}
		if src.Damaged > 0 {
			t += fmt.Sprintf(", %d damaged", src.Damaged)
		}
		if src.ReceiveBuffer > 0 {
			t += ", buffer " + text.Bytes(uint64(src.ReceiveBuffer))
		}
		if src.Note != "" {
			t += "; " + src.Note
		}
		line(first(i, "sources"), "%s", t)
	}
	for i := range s.Exports {
		line(first(i, "exports"), "%s", exportText(&s.Exports[i], now))
	}
	for i, g := range s.Groups {
		line(first(i, "groups"), "NFLOG %d", g)
	}
	line("flows", "%d open of at most %d, %d had to go before their end", s.Table.Open, s.Table.Max, s.Table.Evicted)
	line("history", "%d failed of at most %d, since %s", s.History.Failures, s.History.FailuresMax, ago(s.History.FailuresSince))
	line("", "%d others of at most %d, all since %s", s.History.Successes, s.History.SuccessesMax, ago(s.History.Since))
	line("ring", "%d updates so far, room for %d, %d readers", s.Ring.Published, s.Ring.Size, s.Ring.Readers)
	var lost uint64
	for i := range s.Losses {
		l := &s.Losses[i]
		lost += l.Events
		line(first(i, "lost"), "%d events: %s, %s, last at %s", l.Events, l.Source, l.Where, time.Unix(0, l.To).Local().Format("15:04:05"))
	}
	if lost == 0 {
		line("lost", "nothing")
	}
	if s.ConntrackLimit > 0 {
		line("conntrack", "%d of %d entries (%d %%)", s.ConntrackEntries, s.ConntrackLimit, 100*s.ConntrackEntries/s.ConntrackLimit)
	}
	for i, t := range virtualLines(s.Virtual) {
		line(first(i, "ipvs"), "%s", t)
	}
	for i, t := range s.Paths {
		line(first(i, "paths"), "%s", t)
	}
	for i, c := range s.Sysctls {
		line(first(i, "sysctls"), "%s: was %s, is %s, set back at the end if still so", c.Name, c.Before, c.Now)
	}
	for i, t := range s.Blind {
		line(first(i, "not seen"), "%s", t)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func first(i int, name string) string {
	if i == 0 {
		return name
	}
	return ""
}

// kernelStatus probes in a sandbox, or says why there can be none.
func kernelStatus(cmd *cobra.Command, output string) error {
	if netns.Inside() {
		return printFeatures(cmd.OutOrStdout(), features.Probe(cmd.Context()), output)
	}
	code, err := netns.Reexec(cmd.Context(), netns.Sandbox{
		Args: []string{"status", "--kernel", "-o", output}, Stdout: cmd.OutOrStdout(), Stderr: cmd.ErrOrStderr(),
		Forward: []os.Signal{os.Interrupt},
	})
	switch {
	case err != nil:
		list := features.Unavailable(err)
		if len(list) == 0 {
			return err
		}
		return printFeatures(cmd.OutOrStdout(), list, output)
	case code != 0:
		return &exitCodeError{code: code}
	}
	return nil
}

// featureJSON is a feature in JSON.
type featureJSON struct {
	Name     string `json:"name"`
	Present  bool   `json:"present"`
	Required bool   `json:"required"`
	Detail   string `json:"detail,omitempty"`
	Fix      string `json:"fix,omitempty"`
}

// printFeatures writes the list; that something required is missing is an
// error with exit code 1.
func printFeatures(w io.Writer, all []features.Feature, output string) error {
	if output == "json" {
		list := []featureJSON{}
		for _, f := range all {
			list = append(list, featureJSON(f))
		}
		if err := printJSON(w, map[string]any{"schemaVersion": 1, "features": list}); err != nil {
			return err
		}
	} else {
		for _, f := range all {
			if _, err := fmt.Fprintln(w, f); err != nil {
				return err
			}
		}
	}
	missing := features.Missing(all)
	if len(missing) == 0 {
		return nil
	}
	var names []string
	for _, f := range missing {
		names = append(names, f.Name)
	}
	return fmt.Errorf("kptrace cannot work here without: %s", strings.Join(names, ", "))
}

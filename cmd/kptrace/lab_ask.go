package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/lab"
)

// labTarget are the flags of commands about one pod or node of a lab.
type labTarget struct{ name, namespace string }

func (f *labTarget) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.name, "name", "", "name of the lab")
	cmd.Flags().StringVarP(&f.namespace, "namespace", "n", "default", "namespace of the pod")
}

func newLabExecCmd() *cobra.Command {
	var f labTarget
	cmd := &cobra.Command{
		Use:   "exec TARGET -- COMMAND [ARG...]",
		Short: "Run a command in a pod or node of the lab",
		Long: `Run a command in the network namespace of a pod or node of the lab, with this
terminal's input and output; its exit code is ours. "kptrace" as the command is
this binary.`,
		Example: `  kptrace lab exec pod/web -n shop -- curl -s http://10.96.0.10
  kptrace lab exec pod/web -n shop -- kptrace lab get http://10.96.0.10
  kptrace lab exec node/node1 -- iptables-save -t nat`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usageErr(errors.New("say where and what: kptrace lab exec pod/NAME -n NAMESPACE -- COMMAND"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return execInLab(cmd, f, args[0], args[1:])
		},
	}
	f.add(cmd)
	cmd.Flags().SetInterspersed(true)
	return cmd
}

func execInLab(cmd *cobra.Command, f labTarget, where string, args []string) error {
	target, err := lab.ParseTarget(where, f.namespace)
	if err != nil {
		return usageErr(err)
	}
	control, err := lab.DialControl(cmd.Context(), labSockets(f.name))
	if err != nil {
		return err
	}
	defer control.Close()
	code, err := control.Exec(cmd.Context(), target, args, [3]*os.File{os.Stdin, os.Stdout, os.Stderr})
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &exitCodeError{code: 127, err: err} // as a shell has it
	case err != nil:
		return err
	case code != 0:
		return &exitCodeError{code: code}
	}
	return nil
}

func newLabGetCmd() *cobra.Command {
	var f labTarget
	var from string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "get URL",
		Short: "Get a URL over a new connection, and print the body",
		Example: `  kptrace lab get http://10.96.0.10 --from pod/web -n shop
  kptrace lab exec pod/web -n shop -- kptrace lab get http://10.96.0.10`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageErr(errors.New("give one URL"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if from != "" {
				return execInLab(cmd, f, from, []string{"kptrace", "lab", "get", args[0], "--timeout", timeout.String()})
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			return get(ctx, cmd.OutOrStdout(), args[0])
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&from, "from", "", "pod or node of the lab to do it in (default: here)")
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Second, "how long it may take")
	return cmd
}

func get(ctx context.Context, w io.Writer, url string) error {
	if !strings.Contains(url, "://") {
		url = "http://" + url
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return usageErr(err)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}} // no proxy: straight there
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(w, resp.Body); err != nil {
		return fmt.Errorf("reading the answer of %s: %w", url, err)
	}
	if resp.StatusCode >= 400 {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	return nil
}

func newLabFaultCmd() *cobra.Command {
	var f labTarget
	var ms int
	var kinds strings.Builder
	var words []string
	for _, k := range lab.Faults() {
		fmt.Fprintf(&kinds, "  %-10s %s\n", k[0], k[1])
		words = append(words, k[0])
	}
	cmd := &cobra.Command{
		Use:     "fault KIND POD",
		Short:   "Do something to a pod of the lab: " + strings.Join(words, ", "),
		Long:    "Do something to a pod of the lab:\n\n" + kinds.String() + "\nFaults add up until the pod is healed.",
		Example: "  kptrace lab fault refuse pod/foo-1 -n shop\n  kptrace lab fault slow pod/foo-1 -n shop --ms 200\n  kptrace lab fault heal pod/foo-1 -n shop",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usageErr(fmt.Errorf("say what and to whom: kptrace lab fault {%s} pod/NAME -n NAMESPACE", strings.Join(words, "|")))
			}
			return nil
		},
		ValidArgs: words,
		RunE: func(cmd *cobra.Command, args []string) error {
			target, err := lab.ParseTarget(args[1], f.namespace)
			if err != nil {
				return usageErr(err)
			}
			control, err := lab.DialControl(cmd.Context(), labSockets(f.name))
			if err != nil {
				return err
			}
			defer control.Close()
			return control.Fault(args[0], target, time.Duration(ms)*time.Millisecond)
		},
	}
	f.add(cmd)
	cmd.Flags().IntVar(&ms, "ms", 200, "milliseconds, for slow")
	return cmd
}

func newLabDownCmd() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:     "down",
		Short:   "End the lab",
		Example: "  kptrace lab down",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			control, err := lab.DialControl(cmd.Context(), labSockets(name))
			if err != nil {
				return err
			}
			defer control.Close()
			return control.Down()
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "name of the lab")
	return cmd
}

func newLabStatusCmd() *cobra.Command {
	var name, output string
	cmd := &cobra.Command{
		Use:     "status",
		Short:   "Show the lab's nodes, pods and faults",
		Example: "  kptrace lab status",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := textOrJSON(output); err != nil {
				return err
			}
			control, err := lab.DialControl(cmd.Context(), labSockets(name))
			if err != nil {
				return err
			}
			defer control.Close()
			s, err := control.Status()
			if err != nil {
				return err
			}
			if output == "json" {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(s)
			}
			return printLabStatus(cmd.OutOrStdout(), s)
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "name of the lab")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

func printLabStatus(w io.Writer, s *lab.Status) error {
	fmt.Fprintf(w, "lab since %s, state in %s\n\n", s.Started.Local().Format("15:04:05"), s.Dir)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "TARGET\tADDRESS\tNODE\tFAULTS")
	for _, n := range s.Nodes {
		fmt.Fprintf(tw, "node/%s\t%s\t\t\n", n.Name, n.Addr)
	}
	for _, p := range s.Pods {
		where := p.Node
		if where == "" {
			where = "outside"
		}
		fmt.Fprintf(tw, "pod/%s/%s\t%s\t%s\t%s\n", p.Namespace, p.Name, p.Addr, where, strings.Join(p.Faults, ", "))
	}
	return tw.Flush()
}

// Command kptrace shows what Kubernetes service networking did with a packet,
// and why. It contains a kube-proxy, the sources that watch the kernel, and
// everything a person needs to ask what happened.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/internal/umlguest"
)

// Exit codes, as every verb uses them.
const (
	exitError   = 1 // something went wrong
	exitUsage   = 2 // the call was wrong
	exitProblem = 3 // all went well, and a problem was found
)

func main() {
	umlguest.Init() // does not return in the first process of a sandbox or a guest
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run is the whole program, so that tests can call it.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	root := newRootCmd()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var exit *exitCodeError
	if errors.As(err, &exit) {
		if exit.err != nil {
			fmt.Fprintln(stderr, "kptrace:", exit.err)
		}
		return exit.code
	}
	if errors.Is(err, syscall.EPIPE) {
		return 0 // whoever read us has seen enough
	}
	fmt.Fprintln(stderr, "kptrace:", err)
	return exitError
}

// exitCodeError ends the program with a code of its own.
type exitCodeError struct {
	code int
	err  error // nil where everything has been said
}

func (e *exitCodeError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitCodeError) Unwrap() error { return e.err }

func usageErr(err error) error { return &exitCodeError{code: exitUsage, err: err} }

// needsRoot says of what an ordinary user may not do that root may. What programs
// print counts too, of which only the first line is kept.
func needsRoot(what string, err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	printed := strings.Contains(text, "ermission denied") || strings.Contains(text, "not permitted")
	if !errors.Is(err, fs.ErrPermission) && (os.Geteuid() == 0 || !printed) {
		return err
	}
	first, _, _ := strings.Cut(text, "\n")
	return fmt.Errorf("%s needs root (CAP_NET_ADMIN; a kptrace lab does without): %s", what, first)
}

// noArgs refuses arguments.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageErr(fmt.Errorf("unexpected argument %q; see %s --help", args[0], cmd.CommandPath()))
	}
	return nil
}

// textOrJSON refuses other formats of -o.
func textOrJSON(output string) error {
	if output == "text" || output == "json" {
		return nil
	}
	return usageErr(fmt.Errorf("-o: unknown format %q: use text or json", output))
}

func newRootCmd() *cobra.Command {
	root := &cobra.Command{
		Use:   "kptrace",
		Short: "Show what Kubernetes service networking did with a packet, and why",
		Long: `kptrace shows exactly what Kubernetes service networking did with a packet, and
why: which endpoint, by which rule, with what chance, was it affinity, was it
retried, and what then happened.

It contains a kube-proxy in three modes (kptrace proxy), an agent that watches
beside the kube-proxy you have (kptrace agent), a cluster in namespaces to try it
on without root (kptrace lab), and the questions: follow, explain, check, diagnose,
show, status.`,
		Example: `  # A cluster on this machine, traffic, and one line per connection, for 15 s
  kptrace lab run --for 15s

  # What happens to connections to a Service, live
  kptrace follow svc/foo -n shop

  # Only what failed, everywhere, in the last ten minutes
  kptrace follow -A --outcome failed --since 10m`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageErr(fmt.Errorf("unknown command %q%s; kptrace --help lists them", args[0], suggestion(cmd, args[0])))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetVersionTemplate(versionLine() + "\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageErr(fmt.Errorf("%w; see %s --help", err, cmd.CommandPath()))
	})
	root.AddCommand(newLabCmd(), newProxyCmd(), newAgentCmd(), newRecordCmd(), newReplayCmd(), newBugreportCmd(), newFollowCmd(), newExplainCmd(), newCheckCmd(), newDiagnoseCmd(), newShowCmd(), newStatusCmd(), newCleanupCmd(), newDashboardsCmd(), newVersionCmd(), newReasonsTopic())
	root.InitDefaultHelpCmd()
	for _, c := range root.Commands() {
		if c.Name() == "help" {
			c.Args = func(_ *cobra.Command, args []string) error { return knownTopic(root, args) }
		}
	}
	return root
}

// knownTopic refuses help on what is no command.
func knownTopic(root *cobra.Command, args []string) error {
	cmd, left, err := root.Find(args)
	if err == nil && (len(left) == 0 || !cmd.HasSubCommands()) {
		return nil
	}
	word := strings.Join(args, " ")
	return usageErr(fmt.Errorf("no help on %q%s; %s --help lists what there is", word, suggestion(cmd, word), cmd.CommandPath()))
}

func suggestion(cmd *cobra.Command, word string) string {
	cmd.SuggestionsMinimumDistance = 2 // letters that may be wrong
	if near := cmd.SuggestionsFor(word); len(near) > 0 {
		return fmt.Sprintf(": did you mean %q?", near[0])
	}
	return ""
}

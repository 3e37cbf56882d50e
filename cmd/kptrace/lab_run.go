package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/lab"
	"github.com/kptrace/kptrace/proxy/kube/manifests"
	"github.com/kptrace/kptrace/trace"
)

const (
	// labStartTime is how long nodes may take until they are ready.
	labStartTime = 30 * time.Second
	// labSettle is how long flows are given at the end of a run before they
	// are judged: an unanswered one is called so after a second.
	labSettle = 1300 * time.Millisecond
)

func newLabRunCmd() *cobra.Command {
	var f labFlags
	var scenario, output string
	var runFor time.Duration
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run a scenario, show each connection, and sum up",
		Long: `Run a scenario: make the lab, let traffic flow, show one line per connection,
and sum up at the end: connections, shares, outcomes, time to establish.

The lab's clients know which pod answered them, and what their kernel said. All
of it is compared with what was shown; exit code 3 says that they differ.

Meanwhile kptrace lab exec, fault, status and down work from other terminals.`,
		Example: `  kptrace lab run --for 15s

  # The summary alone, as one line of JSON
  kptrace lab run --for 10s -o json

  # IPVS with its schedulers: of this kernel, or of a guest kernel where this
  # one has none
  kptrace lab run --mode ipvs

  # Any mode in the guest kernel (one CPU, iptables-legacy), to compare modes
  kptrace lab run --guest --scenario schedulers

  # A folder of Kubernetes YAML of your own
  kptrace lab run --scenario ./state`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if runFor <= 0 {
				return usageErr(fmt.Errorf("--for=%v: give a time above 0", runFor))
			}
			if output != "text" && output != "json" && output != "jsonl" {
				return usageErr(fmt.Errorf("-o %q: use text, json or jsonl", output))
			}
			if err := f.check(); err != nil {
				return err
			}
			if scenario == "" {
				scenario = f.defaultScenario()
			}
			cfg := f.config()
			if info, err := os.Stat(scenario); err == nil && info.IsDir() {
				cfg.Dir = scenario
			} else {
				cfg.Scenario = scenario
			}
			return f.inLab(cmd, func(ctx context.Context) error {
				return runLab(ctx, cmd, cfg, f.verbose, runFor, output)
			})
		},
	}
	f.add(cmd)
	cmd.Flags().DurationVar(&runFor, "for", 15*time.Second, "how long traffic flows")
	cmd.Flags().StringVar(&scenario, "scenario", "", fmt.Sprintf("one of %v, or a folder of Kubernetes YAML (default: demo, or schedulers with --mode ipvs)", lab.Scenarios()))
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text, json (the summary alone) or jsonl (each connection, then the summary)")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json", "jsonl"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func runLab(ctx context.Context, cmd *cobra.Command, cfg lab.Config, verbose bool, runFor time.Duration, output string) error {
	// Ctrl-C ends the traffic, and the summary is of what there was; the
	// second one ends us.
	interrupted, stop := signal.NotifyContext(ctx, os.Interrupt)
	defer stop()
	var c lab.Collector
	cfg.Report = c.Report
	l, err := startLab(interrupted, cmd, cfg, verbose)
	if err != nil {
		return err
	}
	defer l.Close()
	snap, err := manifests.New(manifests.Config{Dir: l.Dir(), Node: l.Cluster().Nodes[0].Name}).Load()
	if err != nil {
		return err
	}
	control, endControl := context.WithCancel(ctx)
	controlled := make(chan error, 1)
	go func() { controlled <- l.ServeControl(control, func() {}, stop) }()
	defer func() {
		endControl()
		if err := <-controlled; err != nil {
			fmt.Fprintln(cmd.ErrOrStderr(), "kptrace:", err)
		}
	}()
	show := showNothing
	if output != "json" {
		show = showFlows(cmd, output, len(l.Cluster().Nodes))
	}
	if err := watchLab(ctx, interrupted, l, &c, runFor, show, stop); err != nil {
		return err
	}
	return sumUp(cmd, lab.Judge(c.Evidence(l.Cluster(), snap)), output)
}

func sumUp(cmd *cobra.Command, s *lab.Summary, output string) error {
	var err error
	if output == "text" {
		fmt.Fprintln(cmd.OutOrStdout())
		err = s.WriteText(cmd.OutOrStdout())
	} else {
		err = json.NewEncoder(cmd.OutOrStdout()).Encode(s)
	}
	if err == nil && !s.OK() {
		err = &exitCodeError{code: exitProblem}
	}
	return err
}

// watchLab lets traffic flow until runFor is over or interrupted ends, and
// returns when all that came of it was shown.
func watchLab(ctx, interrupted context.Context, l *lab.Lab, c *lab.Collector, runFor time.Duration,
	show func(context.Context, <-chan trace.Message) error, stop func(),
) error {
	stream := make(chan trace.Message, 1024)
	shown := make(chan error, 1)
	go func() { shown <- show(ctx, stream) }()

	group, groupCtx := errgroup.WithContext(ctx)
	following, endFollow := context.WithCancel(groupCtx)
	ready := make(chan struct{})
	group.Go(func() error {
		return l.Follow(following, func() { close(ready) }, func(m trace.Message) error {
			c.Message(m)
			stream <- m
			return nil
		})
	})
	group.Go(func() error {
		defer endFollow()
		return letFlow(groupCtx, interrupted, l, runFor, ready, stop)
	})
	err := group.Wait()
	close(stream) // all nodes have said their last
	return errors.Join(err, <-shown)
}

// letFlow is the traffic's course.
func letFlow(ctx, interrupted context.Context, l *lab.Lab, runFor time.Duration, ready <-chan struct{}, stop func()) error {
	select {
	case <-ready:
	case <-ctx.Done():
		return nil // whoever failed says why
	}
	if err := l.StartTraffic(ctx); err != nil {
		return err
	}
	select {
	case <-time.After(runFor):
	case <-interrupted.Done():
	case <-ctx.Done():
		return nil
	case e := <-l.Ended():
		return fmt.Errorf("the proxy of %s ended early: %w", e.Node, cmp.Or(brief(e.Err), errors.New("without an error")))
	}
	stop() // from here on Ctrl-C ends us at once
	if err := l.StopTraffic(ctx); err != nil {
		return err
	}
	select {
	case <-time.After(labSettle):
	case <-ctx.Done():
	}
	return nil
}

// brief returns how a program ended, without its command line.
func brief(err error) error {
	if failed := (*exec.Error)(nil); errors.As(err, &failed) {
		return failed.Err
	}
	return err
}

// showNothing drains the stream, so that nobody waits for a reader.
func showNothing(_ context.Context, stream <-chan trace.Message) error {
	for range stream {
	}
	return nil
}

// showFlows shows flows as kptrace follow does. If that fails the stream is
// drained, so that nobody waits for us.
func showFlows(cmd *cobra.Command, output string, nodes int) func(context.Context, <-chan trace.Message) error {
	cfg := text.Config{Out: cmd.OutOrStdout(), Err: cmd.ErrOrStderr(), Format: text.Line, Nodes: nodes}
	if output == "jsonl" {
		cfg.Format = text.JSONL
	}
	return func(ctx context.Context, stream <-chan trace.Message) error {
		err := text.Run(ctx, cfg, stream)
		return errors.Join(err, showNothing(ctx, stream))
	}
}

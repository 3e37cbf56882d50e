package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/internal/umlguest"
	"github.com/kptrace/kptrace/lab"
	"github.com/kptrace/kptrace/lab/load"
	"github.com/kptrace/kptrace/proxy"
)

func newLabCompareCmd() *cobra.Command {
	var f labFlags
	var modes []string
	var asJSON bool
	cfg := lab.CompareConfig{Bulk: 256 << 20, Patience: 4 * time.Second}
	cmd := &cobra.Command{
		Use:   "compare",
		Short: "Run one workload through every mode, and compare",
		Long: `Run one workload through every mode: one client, one Service, three pods of
which one is well, refuses, or is silent. Each row is a lab of its own.

First connections are made at an even rate: how many failed (as the client saw
it, which waits 4 s, in a guest 10 s), how many were retried and how long they
took to establish (as the node saw it), and which pod got how many. Then 32 at once are made as fast as they can be:
connections per second, processor time and context switches of all processes,
clients and pods included. Once more, in half the time, their system calls are
counted, which only root may do, outside of user namespaces and guests. Then bytes
are moved in bulk.

All modes run in the same kernel. Where one of them needs the guest, because
this kernel has no IPVS, all do; it has one CPU and slow system calls, so there
are fewer connections in a second, and you may want to leave that mode out to
compare the others at speed.`,
		Example: `  kptrace lab compare

  # Two modes in this kernel
  kptrace lab compare --modes userspace,iptables

  # One line of JSON
  kptrace lab compare --json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := compareModes(cmd, modes, &f)
			if err != nil {
				return err
			}
			if cfg.Connections < 1 || cfg.Rate <= 0 || cfg.Fast <= 0 {
				return usageErr(fmt.Errorf("--connections, --rate and --fast must be above 0"))
			}
			return f.inLab(cmd, func(ctx context.Context) error {
				return compareLab(ctx, cmd, cfg, &f, list, asJSON)
			})
		},
	}
	fl := cmd.Flags()
	fl.StringSliceVar(&modes, "modes", []string{"userspace", "iptables", "ipvs"}, "modes to compare")
	fl.StringVar(&f.flavour, "iptables-flavour", "auto", "auto, nft or legacy")
	fl.BoolVar(&f.guest, "guest", false, "run in a guest kernel even where this one would do")
	fl.IntVar(&cfg.Connections, "connections", 600, "connections at an even rate, for each row")
	fl.Float64Var(&cfg.Rate, "rate", 200, "of them in a second")
	fl.DurationVar(&cfg.Fast, "fast", 2*time.Second, "how long to connect as fast as can be, for each row")
	fl.BoolVar(&asJSON, "json", false, "end with one line of JSON instead of the table")
	return cmd
}

// compareModes reads the list of modes. One that cannot run anywhere here is
// left out, and said.
func compareModes(cmd *cobra.Command, names []string, f *labFlags) ([]proxy.Mode, error) {
	var list []proxy.Mode
	if err := checkFlavour(f.flavour); err != nil {
		return nil, usageErr(err)
	}
	for _, name := range names {
		m, err := proxy.ParseMode(strings.TrimSpace(name))
		if err != nil {
			return nil, usageErr(err)
		}
		if m == proxy.IPVS && !umlguest.Inside() && !umlguest.Native() {
			if err := umlguest.Available(); err != nil && !cmd.Flags().Changed("modes") {
				fmt.Fprintln(cmd.ErrOrStderr(), "left out: ipvs: this kernel has none, and no guest can be started:", err)
				continue
			}
		}
		if m == proxy.IPVS {
			f.mode = string(m) // decides which kernel it takes
		}
		list = append(list, m)
	}
	return list, nil
}

func compareLab(ctx context.Context, cmd *cobra.Command, cfg lab.CompareConfig, f *labFlags, modes []proxy.Mode, asJSON bool) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt)
	defer stop()
	cfg.Ready, cfg.Load = startPatience(), runLoad
	cfg.Lab = lab.Config{SocketDir: labSockets("compare"), ProxyArgs: []string{"--iptables-flavour", f.flavour}}
	if umlguest.Inside() { // everything takes longer there, and more at once would only queue
		cfg.Rate, cfg.Bulk = min(cfg.Rate, 15), cfg.Bulk/8
		cfg.Connections, cfg.Patience = min(cfg.Connections, 120), 10*time.Second
	}
	result := lab.Comparison{Kernel: kernelRelease(), CPUs: runtime.NumCPU()}
	if err := lab.CanCountSystemCalls(); err != nil {
		result.NoSystemCalls = err.Error()
	} else {
		cfg.SystemCalls = true
	}
	for _, c := range lab.Cases(modes) {
		what := fmt.Sprintf("%s, fault %s", c.Mode, c.Fault)
		if c.Reroute > 0 {
			what += ", rerouting after " + c.Reroute.String()
		}
		fmt.Fprintln(cmd.ErrOrStderr(), "measuring:", what)
		row, err := lab.Compare(ctx, cfg, c)
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		result.Modes = append(result.Modes, row)
	}
	if asJSON {
		return json.NewEncoder(cmd.OutOrStdout()).Encode(&result)
	}
	return result.WriteText(cmd.OutOrStdout())
}

// runLoad is the client of comparisons.
func runLoad(ctx context.Context, l lab.Load) (lab.LoadResult, error) {
	r, err := load.Run(ctx, load.Config{
		Target: l.Target, Conns: l.Conns, Duration: l.Duration, Concurrency: l.Concurrency, Rate: l.Rate, Patience: l.Patience,
	})
	out := lab.LoadResult{Done: r.Done, PerSecond: r.PerSecond}
	for _, n := range r.Errors {
		out.Failed += n
	}
	return out, err
}

// kernelRelease is what uname -r says.
func kernelRelease() string {
	b, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return runtime.GOOS
	}
	return strings.TrimSpace(string(b))
}

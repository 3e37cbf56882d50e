package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"sync"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/lab"
	"github.com/kptrace/kptrace/proxy"
)

func newLabCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lab",
		Short: "A cluster in namespaces on this machine, without root",
		Long: `A cluster in namespaces on this machine: nodes that run kptrace itself, pods
with built-in servers and clients, clients outside, and faults on request.

It needs no root, no cluster and no container runtime. All of it vanishes when
it ends, however it ends.`,
		Example: `  # Traffic, one line per connection, and a summary, for 15 s
  kptrace lab run

  # A lab to play with; then, in other terminals:
  kptrace lab up
  kptrace follow svc/foo -n shop
  kptrace lab exec pod/web -n shop -- curl -s http://10.96.0.10
  kptrace lab fault refuse pod/foo-1 -n shop`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageErr(fmt.Errorf("unknown command %q%s; kptrace lab --help lists them", args[0], suggestion(cmd, args[0])))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newLabRunCmd(), newLabCompareCmd(), newLabUpCmd(), newLabStackCmd(), newLabExecCmd(), newLabGetCmd(), newLabFaultCmd(), newLabIncidentCmd(),
		newLabStatusCmd(), newLabDownCmd(), newLabPodCmd(), newLabLoadCmd(), newLabServeCmd())
	return cmd
}

// labFlags are the flags of the commands that make a lab.
type labFlags struct {
	name           string
	mode, flavour  string
	guest          bool
	serverHealth   bool
	kernelTimeouts bool
	bridge         bool
	verbose        bool
}

func (f *labFlags) add(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.name, "name", "", "name of the lab, to have several at once")
	fl.StringVar(&f.mode, "mode", "iptables", "how the nodes' proxies make Services work: iptables, ipvs or userspace")
	fl.StringVar(&f.flavour, "iptables-flavour", "auto", "auto, nft or legacy")
	fl.BoolVar(&f.guest, "guest", false, "run in a guest kernel (user-mode Linux) even where this one would do: to compare modes on one kernel")
	fl.BoolVar(&f.serverHealth, "server-health", false, "have the nodes' proxies take out endpoints that do not answer")
	fl.BoolVar(&f.kernelTimeouts, "kernel-timeouts", false, "keep the kernel's conntrack timeouts instead of short ones")
	fl.BoolVar(&f.bridge, "bridge", false, "hang each node's pods on a bridge (cni0) instead of routing to each")
	fl.BoolVarP(&f.verbose, "verbose", "v", false, "show what the nodes' proxies log")
}

// check refuses what the nodes' proxies would refuse.
func (f *labFlags) check() error {
	if _, err := proxy.ParseMode(f.mode); err != nil {
		return usageErr(err)
	}
	if err := checkFlavour(f.flavour); err != nil {
		return usageErr(err)
	}
	return nil
}

func (f *labFlags) config() lab.Config {
	args := []string{"--mode", f.mode, "--iptables-flavour", f.flavour}
	if f.verbose {
		args = append(args, "--verbose")
	}
	if f.serverHealth {
		args = append(args, "--server-health")
	}
	return lab.Config{
		SocketDir: labSockets(f.name), ProxyArgs: args,
		Options: lab.Options{KernelTimeouts: f.kernelTimeouts, Bridge: f.bridge},
	}
}

// labSockets is where a lab puts its sockets: beside the default one, where
// follow looks, unless the lab has a name of its own.
func labSockets(name string) string {
	dir := filepath.Dir(relay.LabSocket("x"))
	if name != "" {
		dir += "-" + name
	}
	return dir
}

// keepLast keeps the end of what is written, to be shown if things go wrong.
type keepLast struct {
	mu  sync.Mutex
	buf []byte
}

const keepLastBytes = 16 << 10

func (k *keepLast) Write(b []byte) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.buf = append(k.buf, b...)
	if over := len(k.buf) - keepLastBytes; over > 0 {
		k.buf = append(k.buf[:0], k.buf[over:]...)
	}
	return len(b), nil
}

func (k *keepLast) show(w io.Writer) {
	k.mu.Lock()
	defer k.mu.Unlock()
	_, _ = w.Write(k.buf)
}

// startLab makes a lab whose proxies are ready. What they log is shown with
// --verbose, or when it fails.
func startLab(ctx context.Context, cmd *cobra.Command, cfg lab.Config, verbose bool) (*lab.Lab, error) {
	var logs keepLast
	cfg.Output = &logs
	if verbose {
		cfg.Output = cmd.ErrOrStderr()
	}
	l, err := lab.Start(ctx, cfg)
	if err != nil {
		return nil, err
	}
	for _, p := range l.Problems() {
		fmt.Fprintln(cmd.ErrOrStderr(), "problem:", p.Error())
	}
	ready, cancel := context.WithTimeout(ctx, startPatience())
	defer cancel()
	if err := l.WaitReady(ready); err != nil {
		l.Close()
		logs.show(cmd.ErrOrStderr())
		return nil, err
	}
	return l, nil
}

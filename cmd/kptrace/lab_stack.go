package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/lab"
	"github.com/kptrace/kptrace/lab/stack"
	"github.com/kptrace/kptrace/proxy"
)

// stackPages are the servers with a page, and the port at which it is reached
// from outside of the lab, if that is free.
func stackPages() []stackPage {
	pages := []stackPage{{stack.Prometheus, 9090}}
	if stack.HasTracing() {
		pages = append(pages, stackPage{stack.Jaeger, 16686})
	}
	return pages
}

type stackPage struct {
	name string
	port int
}

// pagesEnv tells the inside where its pages are outside.
const pagesEnv = "KPTRACE_STACK_PAGES"

type stackFlags struct {
	lab    labFlags
	check  bool
	outage time.Duration
	runFor time.Duration
	output string
}

func newLabStackCmd() *cobra.Command {
	var f stackFlags
	cmd := &cobra.Command{
		Use:   "stack",
		Short: "A lab with Prometheus, an OpenTelemetry Collector and Jaeger",
		Long: `A lab whose nodes are scraped by a real Prometheus with kptrace's rules, and send
spans to a real OpenTelemetry Collector, which hands them on to Jaeger. Their
pages are forwarded to this machine until Ctrl-C. Collector and Jaeger take part
if $KPTRACE_TRACING names the folder of their programs, as make stack sees to.

With --check it lets traffic flow, makes some pods fail, and holds what
Prometheus and Jaeger have against what the lab's clients counted; it asks every
query of every dashboard panel, evaluates every rule, joins a trace of its own,
takes the collector away for a while, and exits: 3 says that something is not as
it should be. A check works in a guest kernel too, where this one has no IPVS.`,
		Example: `  kptrace lab stack
  kptrace lab stack --check
  kptrace lab stack --check -o json
  kptrace lab stack --check --outage 1m`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.lab.check(); err != nil {
				return err
			}
			if err := f.lab.refuseGuest(cmd); err != nil && !f.check {
				return err
			}
			if f.output != "text" && f.output != "json" {
				return usageErr(fmt.Errorf("-o %q: use text or json", f.output))
			}
			if f.runFor < 10*time.Second {
				return usageErr(fmt.Errorf("--for=%v: give at least 10s, or there is too little to compare", f.runFor))
			}
			if f.outage != 0 && (f.outage < 10*time.Second || !f.check || !stack.HasTracing()) {
				return usageErr(fmt.Errorf("--outage=%v: give at least 10s, --check, and a collector ($%s, see make stack)", f.outage, stack.TracingEnv))
			}
			if f.lab.wantsGuest() { // a check has no pages to reach from outside
				return f.lab.inLab(cmd, func(context.Context) error { return f.outside(cmd) })
			}
			return f.outside(cmd)
		},
	}
	f.lab.add(cmd)
	cmd.Flags().BoolVar(&f.check, "check", false, "check what the servers show against what clients counted, and exit")
	cmd.Flags().DurationVar(&f.outage, "outage", 0, "with --check, also take the collector away for so long while many connections are made")
	cmd.Flags().DurationVar(&f.runFor, "for", 30*time.Second, "with --check, how long traffic flows")
	cmd.Flags().StringVarP(&f.output, "output", "o", "text", "with --check: text or json")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// outside runs the command again inside a sandbox, and forwards its pages.
func (f *stackFlags) outside(cmd *cobra.Command) error {
	if netns.Inside() {
		return f.inside(cmd.Context(), cmd)
	}
	var pages []string
	ctx, cancel := context.WithCancel(cmd.Context())
	group, ctx := errgroup.WithContext(ctx)
	defer func() { cancel(); _ = group.Wait() }()
	if !f.check {
		for _, p := range stackPages() {
			l, err := listenNear(ctx, p.port)
			if err != nil {
				return err
			}
			pages = append(pages, p.name+"=http://"+l.Addr().String())
			group.Go(func() error {
				return stack.Relay(ctx, l, func(ctx context.Context) (net.Conn, error) {
					return new(net.Dialer).DialContext(ctx, "unix", f.pageSocket(p.name))
				})
			})
		}
	}
	code, err := netns.Reexec(ctx, netns.Sandbox{
		Args:    os.Args[1:],
		Env:     []string{"KPTRACE_SOCKET=" + relay.DefaultSocket(), pagesEnv + "=" + strings.Join(pages, ",")},
		Stdout:  cmd.OutOrStdout(),
		Stderr:  cmd.ErrOrStderr(),
		Forward: []os.Signal{syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT},
		Grace:   30 * time.Second,
	})
	if err != nil {
		return err
	}
	if code != 0 {
		return &exitCodeError{code: code}
	}
	return nil
}

// pageSocket is where the inside takes connections to a page.
func (f *stackFlags) pageSocket(name string) string {
	return filepath.Join(labSockets(f.lab.name), name+".page")
}

// listenNear listens on a port of the loopback, or on another if it is taken.
func listenNear(ctx context.Context, port int) (net.Listener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if errors.Is(err, syscall.EADDRINUSE) {
		l, err = lc.Listen(ctx, "tcp", "127.0.0.1:0")
	}
	return l, err
}

func (f *stackFlags) inside(ctx context.Context, cmd *cobra.Command) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGHUP)
	defer stop()
	var reports reportList
	cfg := f.lab.config()
	cfg.ProxyArgs = append(cfg.ProxyArgs, stack.ProxyArgs()...)
	if stack.HasTracing() {
		args, err := stack.TracingArgs(lab.DefaultScenario, f.joined())
		if err != nil {
			return err
		}
		cfg.ProxyArgs = append(cfg.ProxyArgs, args...)
	}
	cfg.Report = reports.add
	l, err := startLab(ctx, cmd, cfg, f.lab.verbose)
	if err != nil {
		return err
	}
	defer l.Close()
	dir, err := os.MkdirTemp("", "kptrace-stack-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	logs := io.Writer(new(keepLast))
	if f.lab.verbose {
		logs = cmd.ErrOrStderr()
	}
	s := stack.New(stack.Config{Lab: l, Dir: dir, Output: logs})
	defer s.Close()
	if err := f.start(ctx, s); err != nil {
		if k, ok := logs.(*keepLast); ok {
			k.show(cmd.ErrOrStderr())
		}
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	ctx, end := context.WithCancel(ctx)
	group.Go(func() error { return l.ServeControl(ctx, func() {}, stop) })
	group.Go(func() error {
		defer end()
		if err := l.StartTraffic(ctx); err != nil {
			return err
		}
		if f.check {
			return f.judge(ctx, cmd, s, &reports)
		}
		return f.show(ctx, cmd, s)
	})
	return group.Wait()
}

// start starts the servers.
func (f *stackFlags) start(ctx context.Context, s *stack.Stack) error {
	if stack.HasTracing() {
		if err := s.StartTracing(ctx); err != nil {
			return err
		}
	}
	return s.StartPrometheus(ctx)
}

// joined reports whether connections can join the traces of applications.
func (f *stackFlags) joined() bool { return f.lab.mode == string(proxy.IPTables) || f.lab.mode == "" }

// show forwards the pages until ctx ends.
func (f *stackFlags) show(ctx context.Context, cmd *cobra.Command, s *stack.Stack) error {
	group, ctx := errgroup.WithContext(ctx)
	for page := range strings.SplitSeq(os.Getenv(pagesEnv), ",") {
		name, url, ok := strings.Cut(page, "=")
		if !ok {
			continue
		}
		socket := f.pageSocket(name)
		_ = os.Remove(socket)
		l, err := new(net.ListenConfig).Listen(ctx, "unix", socket)
		if err != nil {
			return err
		}
		defer os.Remove(socket)
		fmt.Fprintf(cmd.OutOrStdout(), "%-12s %s\n", name, url)
		group.Go(func() error { return s.Forward(ctx, name, l) })
	}
	fmt.Fprintln(cmd.OutOrStdout(), "Dashboards for Grafana: kptrace dashboards export DIR --provision. Ctrl-C ends it all.")
	<-ctx.Done()
	return group.Wait()
}

// judge lets traffic flow, makes pods fail, and checks what came of it.
func (f *stackFlags) judge(ctx context.Context, cmd *cobra.Command, s *stack.Stack, reports *reportList) error {
	const silent = "foo-3"
	third := f.runFor / 3
	pause := func(d time.Duration) {
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
	}
	l := s.Lab()
	pause(third)
	if err := l.Fault(ctx, lab.FaultBlackhole, "shop/"+silent, 0); err != nil {
		return err
	}
	if err := s.Change(); err != nil {
		return err
	}
	pause(third)
	if err := l.Fault(ctx, lab.FaultHeal, "shop/"+silent, 0); err != nil {
		return err
	}
	pause(f.runFor - 2*third)
	if err := l.StopTraffic(ctx); err != nil {
		return err
	}
	var results []stack.Result
	prometheus, err := s.Prometheus()
	if err != nil {
		return err
	}
	if err := prometheus.Settle(ctx); err != nil {
		results = append(results, stack.Result{Name: "all connections end", Detail: err.Error()})
	}
	results = append(results, s.CheckPrometheus(ctx, reports.all(), f.lab.mode, []string{"dead"}, []string{silent})...)
	if stack.HasTracing() {
		results = append(results, s.CheckExemplars(ctx)...)
		results = append(results, s.CheckTracing(ctx, reports.all(), f.joined())...)
		if f.outage > 0 {
			results = append(results, s.CheckOutage(ctx, f.outage)...)
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return printResults(cmd, results, f.output)
}

func printResults(cmd *cobra.Command, results []stack.Result, output string) error {
	ok := !slices.ContainsFunc(results, func(r stack.Result) bool { return !r.OK })
	out := cmd.OutOrStdout()
	if output == "json" {
		err := json.NewEncoder(out).Encode(struct {
			OK     bool           `json:"ok"`
			Checks []stack.Result `json:"checks"`
		}{ok, results})
		if err != nil {
			return err
		}
	} else {
		for _, r := range results {
			word := "ok  "
			if !r.OK {
				word = "FAIL"
			}
			fmt.Fprintf(out, "%s  %s: %s\n", word, r.Name, strings.ReplaceAll(r.Detail, "\n", "\n        "))
		}
	}
	if !ok {
		return &exitCodeError{code: exitProblem}
	}
	return nil
}

// reportList keeps what clients report.
type reportList struct {
	mu   sync.Mutex
	list []lab.Report
}

func (r *reportList) add(x lab.Report) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, x)
}

func (r *reportList) all() []lab.Report {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.list)
}

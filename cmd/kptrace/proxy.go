package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"sync/atomic"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/node"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/ipvs"
	"github.com/kptrace/kptrace/proxy/kube/apiserver"
	"github.com/kptrace/kptrace/proxy/kube/config"
	"github.com/kptrace/kptrace/proxy/userspace"
)

// proxyFlags are the flags of kptrace proxy and, in part, of cleanup.
type proxyFlags struct {
	manifests, flavour string
	kube               kubeFlags
	relay              relayFlags
	ipvs               ipvsFlags
	modeFallback       bool
	takeOver           bool
	serverHealth       bool
	trace              bool
	group              uint16
	pathBuffer         int
	socket             string
	dryRun             bool
	undo               string
	verbose            bool
	historySuccesses   int
	historyFailures    int
	metrics            metricsFlags
	otlp               otlpFlags
}

func newProxyCmd() *cobra.Command {
	var f proxyFlags
	cmd := &cobra.Command{
		Use:   "proxy",
		Short: "Run the kube-proxy, with tracing in the same process",
		Long: `Run the kube-proxy: program the kernel so that Services work on this node, and
watch what the kernel does with their packets.

State comes from an API server (--kubeconfig, or the service account of the pod
this runs in), or from a folder of ordinary Kubernetes YAML (Service,
EndpointSlice, Pod, Node), which is watched: edit a file and the kernel follows.
An API server that goes away changes nothing: the last state stays in force.

What it changes on the node: chains named KUBE-* and KPTRACE in iptables (mangle,
nat, filter; in raw while somebody follows paths), and the sysctls that kptrace
status lists. SIGTERM leaves the
rules, as kube-proxy does, so that a restart interrupts nothing; Ctrl-C removes
them and sets the sysctls back, if they are still as kptrace made them. After
kill -9, the next start takes over, or kptrace cleanup undoes it by hand.

In userspace mode this process accepts connections and dials the pods itself,
so it tries the next pod where one does not answer; its rules lead to its own
ports and go whenever it ends.

In IPVS mode it makes, besides rules, the device kube-ipvs0, ipsets named KUBE-*
and KPTRACE-*, and one virtual server for each address of a Service; virtual
servers of others are left alone. It needs the kernel module ip_vs.

A start in one mode removes the rules of others.`,
		Example: `  # Program Services from a folder, trace, and serve kptrace follow
  kptrace proxy --manifests ./state --node node1

  # The same from an API server, on a node of its cluster
  kptrace proxy --kubeconfig /var/lib/kube-proxy/kubeconfig.conf

  # Try the next pod when one does not answer, and show each try in follow
  kptrace proxy --manifests ./state --node node1 --mode userspace

  # Take endpoints out that do not answer, in any mode
  kptrace proxy --manifests ./state --node node1 --server-health

  # Let IPVS balance by weighted least connections; without ip_vs it says so and
  # uses iptables
  kptrace proxy --manifests ./state --node node1 --mode ipvs --ipvs-scheduler wlc

  # Send one in ten connections to a collector, and all that fail or are slow
  kptrace proxy --manifests ./state --node node1 --otlp-endpoint http://collector:4317 --otlp-sample 0.1

  # iptables mode, where a pod that is silent for half a second loses the
  # connection to another one
  kptrace proxy --manifests ./state --node node1 --reroute-unanswered 500ms

  # What would it program? Needs no root, works on any OS
  kptrace proxy --manifests ./state --node node1 --dry-run

  # The same without tracing rules: exactly what kube-proxy would program
  kptrace proxy --manifests ./state --node node1 --trace=false --dry-run`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runProxy(cmd, f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.manifests, "manifests", "", "folder of Kubernetes YAML to take state from, instead of an API server")
	f.kube.add(fl)
	f.relay.add(fl)
	f.ipvs.add(fl)
	fl.BoolVar(&f.modeFallback, "mode-fallback", true, "where the wanted mode cannot run, use the next one of ipvs, iptables and userspace and say so; false refuses")
	addBackendFlags(cmd, &f)
	fl.BoolVar(&f.takeOver, "take-over", false, "start although KUBE-* rules are live in the other iptables flavour, and remove them")
	fl.BoolVar(&f.trace, "trace", true, "watch what the kernel does with Service packets")
	fl.Uint16Var(&f.group, "nflog-group", 100, "NFLOG group for tracing; one that another program holds is never taken")
	fl.IntVar(&f.pathBuffer, "path-buffer", 0, "bytes of reports that the kernel may hold for us while somebody follows paths; 0 is 256 MiB for root, which 5,000 connections at once may need")
	fl.StringVar(&f.socket, "socket", "", "Unix socket to answer follow, show and status on (default: "+relay.DefaultSocket()+")")
	fl.BoolVar(&f.dryRun, "dry-run", false, "print what would be programmed, as iptables-restore takes it, and exit")
	fl.StringVar(&f.undo, "undo-on-exit", "auto", "remove rules and set sysctls back at the end: always, never, or auto (on Ctrl-C, not on SIGTERM)")
	fl.BoolVar(&f.serverHealth, "server-health", false, "connect to endpoints to see whether they answer, and send no new connections to one that does not, as long as enough others are left")
	fl.BoolVar(&f.verbose, "verbose", false, "log every sync")
	fl.IntVar(&f.historyFailures, "history-failures", 10_000, "failed connections to keep")
	f.metrics.add(cmd)
	f.metrics.addEvents(cmd)
	f.otlp.add(cmd)
	fl.IntVar(&f.historySuccesses, "history-successes", 10_000, "other connections to keep")
	return cmd
}

// addBackendFlags adds the flags that cleanup needs too.
func addBackendFlags(cmd *cobra.Command, f *proxyFlags) {
	cmd.Flags().StringVar(&f.flavour, "iptables-flavour", "auto", "auto, nft or legacy")
	_ = cmd.RegisterFlagCompletionFunc("iptables-flavour", cobra.FixedCompletions([]string{"auto", "nft", "legacy"}, cobra.ShellCompDirectiveNoFileComp))
}

func runProxy(cmd *cobra.Command, f proxyFlags) error {
	kcfg, file, said, err := f.kube.resolve()
	if err != nil {
		return usageErr(err)
	}
	switch {
	case f.kube.version != "false":
		_, err := fmt.Fprintln(cmd.OutOrStdout(), versionLine())
		return err
	case f.kube.writeTo != "":
		return writeConfig(f.kube.writeTo, kcfg)
	case f.kube.cleanup:
		return cleanup(cmd, f.flavour, f.socket)
	}
	wanted, fallback, err := chooseMode(string(kcfg.Mode), f.modeFallback)
	if err != nil {
		return usageErr(err)
	}
	if wanted == config.ModeNFTables {
		kcfg = fromNFTables(kcfg)
	}
	if f.undo != "auto" && f.undo != "always" && f.undo != "never" {
		return usageErr(fmt.Errorf("--undo-on-exit=%q: use auto, always or never", f.undo))
	}
	name, err := nodeName(kcfg.HostnameOverride)
	if err != nil {
		return err
	}
	cfg, err := f.backendConfig(kcfg)
	if err != nil {
		return usageErr(err)
	}
	level := new(slog.LevelVar)
	level.Set(f.kube.level(f.verbose))
	logger := newLogger(cmd.ErrOrStderr(), kcfg.Logging.Format, level)
	for _, s := range said {
		logger.Warn(s)
	}
	var onIPVS *ipvs.Backend
	if wanted == proxy.IPVS {
		if onIPVS, err = f.ipvsBackend(kcfg, &cfg, logger); err != nil {
			return usageErr(err)
		}
		if fallback, err = f.tryIPVS(cmd.Context(), onIPVS); err != nil {
			return err
		}
	}
	chosen := choice{wanted: wanted, mode: wanted}
	if fallback != "" {
		chosen.fallTo(proxy.IPTables, fallback)
	}
	if !f.kube.initOnly {
		if err := f.tryIPTables(cmd.Context(), iptables.NewDual(cfg), &chosen); err != nil {
			return err
		}
	}
	if chosen.fallback != "" {
		logger.Error("falling back to the "+string(chosen.mode)+" mode", "wanted", wanted, "because", chosen.fallback)
	}
	if f.socket == "" {
		f.socket = relay.DefaultSocket()
	}
	nodeCfg, err := f.nodeConfig(kcfg, logger)
	if err != nil {
		return err
	}
	nodeCfg.Name, nodeCfg.Wanted, nodeCfg.Fallback = name, wanted, chosen.fallback
	if nodeCfg.RequestGroup, err = f.otlp.requestGroup(&f, chosen.mode); err != nil {
		return usageErr(err)
	}
	cfg.RequestGroup = nodeCfg.RequestGroup
	if chosen.mode == proxy.IPVS {
		forIPVS(&nodeCfg, kcfg)
	}
	nodeCfg.HTTP.Verbosity = func(n int) { level.Set(levelOf(n, f.verbose)) }
	if f.kube.initOnly {
		return node.Init(nodeCfg)
	}
	if f.dropIn() && !f.dryRun && chosen.mode == proxy.IPTables {
		err := iptables.EnsureCounters()
		if cfg.Counters = err == nil; err != nil {
			logger.Info("two metrics stay absent: the kernel gives no packet counters", "err", err)
		}
	}
	if err := f.relay.checkReroute(chosen.mode, f.trace); err != nil {
		return usageErr(err)
	}
	cfg.Reroute, nodeCfg.Reroute = f.relay.reroute > 0, f.relay.reroute
	var backend proxy.Backend = iptables.NewDual(cfg)
	switch chosen.mode {
	case proxy.IPVS:
		backend = onIPVS
	case proxy.Userspace:
		ucfg, err := f.relay.config(kcfg, &cfg, logger)
		if err != nil {
			return usageErr(err)
		}
		backend = userspace.New(ucfg)
		nodeCfg.NoLocalhost = true // the proxy itself is dialled there
	}
	if nodeCfg.Others, err = allModes(f.flavour, backend.Mode()); err != nil {
		return err
	}
	state, err := openState(f.manifests, apiserver.Config{
		Kubeconfig: kcfg.ClientConnection.Kubeconfig, Master: f.kube.master, NodeName: name, Logger: logger,
		QPS: kcfg.ClientConnection.QPS, Burst: int(kcfg.ClientConnection.Burst), ContentType: kcfg.ClientConnection.ContentType,
	})
	if err != nil {
		return err
	}
	if f.dryRun {
		return dryRun(cmd, backend, state)
	}
	if err := f.kube.adjustOOM(kcfg, f.dropIn()); err != nil {
		logger.Error("the kernel may kill this process as readily as others", "err", err)
	}

	if !f.trace && os.Getenv("GOGC") == "" {
		// Its garbage comes at syncs alone, where nobody waits for the few
		// milliseconds more that it costs to need a third less memory.
		debug.SetGCPercent(30)
	}

	// Ctrl-C is somebody at a terminal who wants it undone; SIGTERM is a
	// restart, which must not interrupt anybody's traffic.
	ctx, cancel := context.WithCancel(cmd.Context())
	defer cancel()
	interrupt := make(chan os.Signal, 1)
	signal.Notify(interrupt, os.Interrupt)
	defer signal.Stop(interrupt)
	var interrupted atomic.Bool
	go func() {
		select {
		case <-interrupt:
			interrupted.Store(true)
			signal.Stop(interrupt) // a second one ends us at once
			cancel()
		case <-ctx.Done():
		}
	}()
	nodeCfg.Backend, nodeCfg.State, nodeCfg.StateFrom, nodeCfg.StateNotes = backend, state.run, state.from, state.notes
	nodeCfg.Undo = func() bool {
		// In userspace mode rules lead to ports of this process, which may be
		// another's soon: they are worse than none.
		return f.undo == "always" || f.undo == "auto" && (interrupted.Load() || backend.Mode() == proxy.Userspace)
	}
	g, ctx := errgroup.WithContext(ctx)
	if state.events == nil && nodeCfg.FailureEventsAfter > 0 {
		return usageErr(errors.New("--failure-events-after needs an API server to record Events at; with --manifests there is none"))
	}
	if state.events != nil {
		nodeCfg.Events = state.events.Record
		g.Go(func() error { return state.events.Run(ctx) })
	}
	g.Go(func() error {
		defer cancel()
		return node.Run(ctx, nodeCfg)
	})
	if file != nil {
		g.Go(func() error { return config.Watch(ctx, f.kube.file, file, unusable(f.kube.file, logger)) })
	}
	return needsRoot("programming the kernel", g.Wait())
}

// checkFlavour refuses what is no value of --iptables-flavour.
func checkFlavour(s string) error {
	switch s {
	case "auto", "nft", "legacy":
		return nil
	}
	return fmt.Errorf("--iptables-flavour=%q: use auto, nft or legacy", s)
}

func dryRun(cmd *cobra.Command, backend proxy.Backend, state *state) error {
	snap, err := state.load(cmd.Context())
	if err != nil {
		return err
	}
	program := backend.Render(snap, proxy.Overlay{})
	problems := append(snap.Problems, program.Problems()...)
	for _, p := range problems {
		fmt.Fprintln(cmd.ErrOrStderr(), "problem:", p.Error())
	}
	if _, err := fmt.Fprint(cmd.OutOrStdout(), program.Text()); err != nil {
		return err
	}
	if len(problems) > 0 {
		return &exitCodeError{code: exitProblem}
	}
	return nil
}

package main

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/node"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/ipvs"
	"github.com/kptrace/kptrace/proxy/kube/apiserver"
	"github.com/kptrace/kptrace/proxy/kube/config"
	"github.com/kptrace/kptrace/proxy/liverules/beside"
)

// agentFlags are the flags of kptrace agent. What a kube-proxy's own flags and
// file say of the kube-proxy beside it is in proxy.kube.
type agentFlags struct {
	proxy    proxyFlags
	readOnly bool
}

// proxyFlagsOfAgent are the flags of kptrace proxy that the agent has too.
func proxyFlagsOfAgent() []string {
	return []string{
		"node", "hostname-override", "config", "kubeconfig", "master", "kube-api-qps", "kube-api-burst", "kube-api-content-type",
		"cluster-cidr", "detect-local-mode", "pod-bridge-interface", "pod-interface-name-prefix", "nodeport-addresses",
		"masquerade-all", "iptables-masquerade-bit", "ipvs-scheduler", "profiling", "v", "logging-format",
	}
}

func newAgentCmd() *cobra.Command {
	f := &agentFlags{}
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Watch the kube-proxy that runs on this node already; nothing is replaced",
		Long: `Watch what the kernel does with Service packets on a node whose kube-proxy is not
kptrace's: upstream's in iptables mode (nft or legacy), nftables or ipvs mode.
follow, explain, check and the exports answer as with kptrace proxy.

Which Services there are comes from the API server or a folder of manifests;
where packets go and with what odds, from the live rules where the mode is
iptables, else from what the mode should do. What cannot be seen here kptrace
status says, and the header of follow.

What it changes on the node: chains named KPTRACE* in table mangle that report
and decide nothing, the ipsets KPTRACE-*, and two sysctls of connection tracking.
All of that goes at the end, however it ends but by kill -9; after that the rules
do no harm, and the next start or kptrace cleanup removes them. --read-only
changes nothing at all: connections are then known from connection tracking
alone, and those that were refused or dropped are not seen.`,
		Example: `  # On a node of a cluster, beside its kube-proxy
  sudo kptrace agent --kubeconfig /etc/kubernetes/admin.conf

  # Then, in another terminal
  sudo kptrace follow svc/foo -n shop
  sudo kptrace check

  # Add nothing to the kernel
  sudo kptrace agent --kubeconfig /etc/kubernetes/admin.conf --read-only`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runAgent(cmd, f) },
	}
	fl := cmd.Flags()
	p := &f.proxy
	all := pflag.NewFlagSet("kptrace proxy", pflag.ContinueOnError)
	p.kube.add(all)
	p.kube.set = fl
	for _, name := range proxyFlagsOfAgent() {
		fl.AddFlag(all.Lookup(name))
	}
	fl.Lookup("config").Usage = "configuration file of the kube-proxy beside this (KubeProxyConfiguration v1alpha1), to predict what it does"
	addBackendFlags(cmd, p)
	fl.StringVar(&p.manifests, "manifests", "", "folder of Kubernetes YAML to take state from, instead of an API server")
	fl.BoolVar(&f.readOnly, "read-only", false, "change nothing on the node, and see less")
	fl.Uint16Var(&p.group, "nflog-group", 100, "NFLOG group for tracing; one that another program holds is never taken")
	fl.IntVar(&p.pathBuffer, "path-buffer", 0, "bytes of reports that the kernel may hold for us while somebody follows paths; 0 is 256 MiB for root, which 5,000 connections at once may need")
	fl.StringVar(&p.socket, "socket", "", "Unix socket to answer follow, show and status on (default: "+relay.DefaultSocket()+")")
	fl.StringVar(&p.kube.cfg.MetricsBindAddress, "metrics-bind-address", "127.0.0.1:9809", "IP:port of /metrics, empty for none")
	fl.BoolVar(&p.verbose, "verbose", false, "log every look at the rules")
	fl.IntVar(&p.historyFailures, "history-failures", 10_000, "failed connections to keep")
	fl.IntVar(&p.historySuccesses, "history-successes", 10_000, "other connections to keep")
	p.metrics.add(cmd)
	p.otlp.add(cmd)
	return cmd
}

func runAgent(cmd *cobra.Command, f *agentFlags) error {
	p := &f.proxy
	metricsAddr := p.kube.cfg.MetricsBindAddress
	kcfg, _, said, err := p.kube.resolve()
	if err != nil {
		return usageErr(err)
	}
	// The ports in a file are those of the kube-proxy it is for.
	kcfg.HealthzBindAddress, kcfg.MetricsBindAddress = "", metricsAddr
	name, err := nodeName(kcfg.HostnameOverride)
	if err != nil {
		return err
	}
	level := new(slog.LevelVar)
	level.Set(p.kube.level(p.verbose))
	logger := newLogger(cmd.ErrOrStderr(), kcfg.Logging.Format, level)
	for _, s := range said {
		logger.Warn(s)
	}
	backend, err := f.backend(kcfg, logger)
	if err != nil {
		return usageErr(err)
	}
	if p.socket == "" {
		p.socket = relay.DefaultSocket()
	}
	cfg, err := f.nodeConfig(kcfg, logger)
	if err != nil {
		return err
	}
	cfg.Name, cfg.Backend = name, backend
	state, err := openState(p.manifests, apiserver.Config{
		Kubeconfig: kcfg.ClientConnection.Kubeconfig, Master: p.kube.master, NodeName: name, Logger: logger,
		QPS: kcfg.ClientConnection.QPS, Burst: int(kcfg.ClientConnection.Burst), ContentType: kcfg.ClientConnection.ContentType,
	})
	if err != nil {
		return err
	}
	cfg.State, cfg.StateFrom, cfg.StateNotes = state.run, state.from, state.notes
	ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends us at once
	return needsRoot("reading the kernel's rules", node.Run(ctx, cfg))
}

// backend makes the one that watches, and the modes of ours that predict.
func (f *agentFlags) backend(c *config.Config, logger *slog.Logger) (*beside.Backend, error) {
	cfg, err := f.proxy.backendConfig(c)
	if err != nil {
		return nil, err
	}
	cfg.Trace = false
	f.proxy.ipvs.grace = ipvs.DefaultGracePeriod
	onIPVS, err := f.proxy.ipvsBackend(c, &cfg, logger)
	if err != nil {
		return nil, err
	}
	onIPTables := iptables.NewDual(cfg)
	return beside.New(beside.Config{
		Flavour: f.proxy.flavour, ReadOnly: f.readOnly, NFLogGroup: f.proxy.group, Logger: logger,
		Predict: func(m proxy.Mode) proxy.Backend {
			if m == proxy.IPVS {
				return onIPVS
			}
			return onIPTables // nftables decides as iptables does
		},
	}), nil
}

// nodeConfig says what the node does, but for its backend and state.
func (f *agentFlags) nodeConfig(c *config.Config, logger *slog.Logger) (node.Config, error) {
	p := &f.proxy
	metrics, err := p.metrics.config()
	if err != nil {
		return node.Config{}, usageErr(err)
	}
	exported, err := p.otlp.config(os.Getenv)
	if err != nil {
		return node.Config{}, usageErr(err)
	}
	return node.Config{
		Version: version, Logger: logger, Metrics: metrics, CheckEvery: p.metrics.checkEvery, CheckMaxRules: p.metrics.checkRules, OTLP: exported, PathBuffer: p.pathBuffer,
		Trace: true, ReadOnly: f.readOnly, NoLocalhost: true,
		NFLogGroup: p.group, MasqueradeMark: 1 << *c.IPTables.MasqueradeBit,
		Socket: p.socket, HistoryFailures: p.historyFailures, HistorySuccesses: p.historySuccesses,
		HTTP: node.HTTPConfig{Metrics: c.MetricsBindAddress, Profiling: c.EnableProfiling, Flags: p.kube.values()},
		Undo: func() bool { return !f.readOnly },
	}, nil
}

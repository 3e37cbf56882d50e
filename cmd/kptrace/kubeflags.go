package main

import (
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	logsapi "k8s.io/component-base/logs/api/v1"

	"github.com/kptrace/kptrace/proxy/kube/config"
)

// kubeFlags are kube-proxy's flags. Those that its configuration file knows
// write into cfg, as they do in kube-proxy, and are ignored with --config.
type kubeFlags struct {
	cfg *config.Config

	file, writeTo             string
	cleanup, initOnly         bool
	version                   string
	hostname, master          string
	mode, localMode           string
	healthzPort, metricsPort  int
	verbosity                 int
	excludeCIDRs, vmodule     []string
	featureGates, flushPeriod string

	set *pflag.FlagSet
}

// add defines the flags.
func (k *kubeFlags) add(fl *pflag.FlagSet) {
	k.cfg, k.set = config.Default(), fl
	c := k.cfg
	fl.StringVar(&k.file, "config", "", "kube-proxy's configuration file (KubeProxyConfiguration v1alpha1); flags that it knows are then ignored, and a change of it ends the process")
	fl.StringVar(&k.writeTo, "write-config-to", "", "write the configuration with its defaults to this file and exit")
	fl.BoolVar(&k.cleanup, "cleanup", false, "remove everything kptrace proxy left on this node and exit, as kptrace cleanup does")
	fl.BoolVar(&k.initOnly, "init-only", false, "make the settings that need full root and exit; later runs need CAP_NET_ADMIN only")
	fl.StringVar(&k.version, "version", "false", "print the version and exit")
	fl.Lookup("version").NoOptDefVal = "true"
	fl.StringVar(&k.hostname, "node", "", "name of this node (default: the host's name)")
	fl.StringVar(&k.hostname, "hostname-override", "", "the same as --node; counts beside --config")
	fl.StringVar(&k.mode, "mode", "iptables", "how Services are made to work: iptables, ipvs or userspace")
	fl.StringVar(&k.mode, "proxy-mode", "iptables", "the same as --mode")

	fl.StringVar(&c.ClientConnection.Kubeconfig, "kubeconfig", "", "file that says how to reach the API server")
	fl.StringVar(&k.master, "master", "", "URL of the API server, instead of kubeconfig's")
	fl.StringVar(&c.ClientConnection.ContentType, "kube-api-content-type", c.ClientConnection.ContentType, "content type of requests to the API server")
	fl.Float32Var(&c.ClientConnection.QPS, "kube-api-qps", c.ClientConnection.QPS, "requests to the API server in a second")
	fl.Int32Var(&c.ClientConnection.Burst, "kube-api-burst", c.ClientConnection.Burst, "requests to the API server in a burst")

	fl.StringVar(&c.HealthzBindAddress, "healthz-bind-address", c.HealthzBindAddress, "IP:port of /healthz and /livez, empty for none; with --manifests none by default")
	fl.StringVar(&c.MetricsBindAddress, "metrics-bind-address", c.MetricsBindAddress, "IP:port of /metrics, /proxyMode and /configz, empty for none; with --manifests none by default")
	fl.BoolVar(&c.BindAddressHardFail, "bind-address-hard-fail", false, "end if one of these cannot be bound, instead of trying again")
	fl.BoolVar(&c.EnableProfiling, "profiling", false, "serve /debug/pprof beside the metrics")

	fl.StringVar(&c.ClusterCIDR, "cluster-cidr", "", "range of pod addresses, or one of each family with a comma; traffic to a Service from outside it is masqueraded")
	fl.StringVar(&k.localMode, "detect-local-mode", "", "how to tell traffic of this node's pods: ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix")
	fl.StringVar(&c.DetectLocal.BridgeInterface, "pod-bridge-interface", "", "bridge of the pods, for BridgeInterface")
	fl.StringVar(&c.DetectLocal.InterfaceNamePrefix, "pod-interface-name-prefix", "", "what names of pods' interfaces begin with, for InterfaceNamePrefix")
	fl.StringSliceVar(&c.NodePortAddresses, "nodeport-addresses", nil, "ranges of this node's addresses that serve node ports, or primary (default: all)")
	fl.BoolVar(&c.IPTables.MasqueradeAll, "masquerade-all", false, "masquerade all traffic to Services")
	fl.Int32Var(c.IPTables.MasqueradeBit, "iptables-masquerade-bit", 14, "bit of the packet mark for traffic to masquerade, 0 to 31")
	fl.BoolVar(c.IPTables.LocalhostNodePorts, "iptables-localhost-nodeports", true, "serve node ports on 127.0.0.1")
	fl.DurationVar(&c.IPTables.SyncPeriod.Duration, "iptables-sync-period", c.IPTables.SyncPeriod.Duration, "half the time after which a change that the kernel has not taken makes healthz fail")
	fl.DurationVar(&c.IPTables.MinSyncPeriod.Duration, "iptables-min-sync-period", c.IPTables.MinSyncPeriod.Duration, "least time between two syncs; 100ms with --manifests unless given")
	k.addIPVS(fl)
	k.addNode(fl)
	k.addIdle(fl)
}

// addNode defines the flags for settings of the node.
func (k *kubeFlags) addNode(fl *pflag.FlagSet) {
	c := &k.cfg.Conntrack
	const leave = "; with --manifests left as it is unless given"
	fl.Int32Var(k.cfg.OOMScoreAdj, "oom-score-adj", *k.cfg.OOMScoreAdj, "how ready the kernel is to kill this process, -1000 to 1000"+leave)
	fl.Int32Var(c.MaxPerCore, "conntrack-max-per-core", *c.MaxPerCore, "conntrack entries per CPU, 0 to leave the limit as it is"+leave)
	fl.Int32Var(c.Min, "conntrack-min", *c.Min, "conntrack entries at least")
	fl.DurationVar(&c.TCPEstablishedTimeout.Duration, "conntrack-tcp-timeout-established", c.TCPEstablishedTimeout.Duration, "timeout of idle TCP connections, 0 to leave"+leave)
	fl.DurationVar(&c.TCPCloseWaitTimeout.Duration, "conntrack-tcp-timeout-close-wait", c.TCPCloseWaitTimeout.Duration, "timeout of TCP connections in CLOSE_WAIT, 0 to leave"+leave)
	fl.BoolVar(&c.TCPBeLiberal, "conntrack-tcp-be-liberal", false, "set nf_conntrack_tcp_be_liberal, and do not drop INVALID packets")
	fl.DurationVar(&c.UDPTimeout.Duration, "conntrack-udp-timeout", 0, "timeout of unanswered UDP, 0 to leave")
	fl.DurationVar(&c.UDPStreamTimeout.Duration, "conntrack-udp-timeout-stream", 0, "timeout of answered UDP, 0 to leave")
	fl.IntVarP(&k.verbosity, "v", "v", 0, "log level; 4 and more log every sync, as --verbose does")
	fl.StringVar(&k.cfg.Logging.Format, "logging-format", k.cfg.Logging.Format, "text or json")
	fl.IntVar(&k.healthzPort, "healthz-port", config.HealthzPort, "0 disables healthz")
	fl.IntVar(&k.metricsPort, "metrics-port", config.MetricsPort, "0 disables metrics")
	_ = fl.MarkDeprecated("healthz-port", "use --healthz-bind-address")
	_ = fl.MarkDeprecated("metrics-port", "use --metrics-bind-address")
}

// addIdle defines the flags that have no meaning here. They are accepted, so
// that a kube-proxy's command line works as it stands.
func (k *kubeFlags) addIdle(fl *pflag.FlagSet) {
	c := k.cfg
	fl.StringVar(&c.BindAddress, "bind-address", c.BindAddress, "")
	fl.StringVar(&k.featureGates, "feature-gates", "", "")
	fl.StringVar(&c.ShowHiddenMetricsForVersion, "show-hidden-metrics-for-version", "", "")
	fl.DurationVar(&c.ConfigSyncPeriod.Duration, "config-sync-period", c.ConfigSyncPeriod.Duration, "")
	fl.StringSliceVar(&k.vmodule, "vmodule", nil, "")
	fl.StringVar(&k.flushPeriod, "log-flush-frequency", "5s", "")
	for name, value := range map[string]string{
		"log-text-info-buffer-size": "0", "log-json-info-buffer-size": "0",
		"boot-id-file": "/proc/sys/kernel/random/boot_id", "machine-id-file": "/etc/machine-id,/var/lib/dbus/machine-id",
	} {
		fl.String(name, value, "")
	}
	fl.Bool("log-text-split-stream", false, "")
	fl.Bool("log-json-split-stream", false, "")
	for _, name := range idleFlags() {
		_ = fl.MarkHidden(name)
	}
}

// idleFlags are the flags that addIdle defines.
func idleFlags() []string {
	return []string{
		"bind-address", "feature-gates", "show-hidden-metrics-for-version", "config-sync-period",
		"vmodule", "log-flush-frequency",
		"log-text-info-buffer-size", "log-json-info-buffer-size", "log-text-split-stream", "log-json-split-stream",
		"boot-id-file", "machine-id-file",
	}
}

// flagOf is the flag behind a field of the configuration, for errors.
func flagOf() map[string]string {
	return map[string]string{
		"mode": "mode", "iptables.masqueradeBit": "iptables-masquerade-bit", "iptables.syncPeriod": "iptables-sync-period",
		"iptables.minSyncPeriod": "iptables-min-sync-period", "ipvs.syncPeriod": "ipvs-sync-period",
		"ipvs.minSyncPeriod": "ipvs-min-sync-period", "ipvs.tcpTimeout": "ipvs-tcp-timeout",
		"ipvs.tcpFinTimeout": "ipvs-tcpfin-timeout", "ipvs.udpTimeout": "ipvs-udp-timeout",
		"ipvs.excludeCIDRs": "ipvs-exclude-cidrs", "conntrack.maxPerCore": "conntrack-max-per-core",
		"conntrack.min": "conntrack-min", "conntrack.tcpEstablishedTimeout": "conntrack-tcp-timeout-established",
		"conntrack.tcpCloseWaitTimeout": "conntrack-tcp-timeout-close-wait", "conntrack.udpTimeout": "conntrack-udp-timeout",
		"conntrack.udpStreamTimeout": "conntrack-udp-timeout-stream", "oomScoreAdj": "oom-score-adj",
		"configSyncPeriod": "config-sync-period", "clientConnection.burst": "kube-api-burst", "bindAddress": "bind-address",
		"healthzBindAddress": "healthz-bind-address", "metricsBindAddress": "metrics-bind-address",
		"nodePortAddresses": "nodeport-addresses", "detectLocalMode": "detect-local-mode",
		"detectLocal.bridgeInterface": "pod-bridge-interface", "detectLocal.interfaceNamePrefix": "pod-interface-name-prefix",
		"clusterCIDR": "cluster-cidr", "logging.format": "logging-format",
	}
}

// besideConfig are the flags that count beside --config.
func besideConfig() []string {
	return []string{"hostname-override", "node", "v", "vmodule", "logging-format", "log-flush-frequency", "master",
		"log-text-info-buffer-size", "log-json-info-buffer-size", "log-text-split-stream", "log-json-split-stream"}
}

// resolve returns the configuration: that of the file, if there is one, else
// that of the flags. raw is the file's contents. What the user should know is
// in said. An error is wrong usage.
func (k *kubeFlags) resolve() (cfg *config.Config, raw []byte, said []string, err error) {
	k.fold()
	cfg = k.cfg
	if k.file != "" {
		if raw, err = os.ReadFile(k.file); err != nil {
			return nil, nil, nil, fmt.Errorf("--config: %w", err)
		}
		var warning string
		if cfg, warning, err = config.Decode(raw); err != nil {
			return nil, nil, nil, fmt.Errorf("--config %s: %w", k.file, err)
		}
		if warning != "" {
			said = append(said, k.file+": "+warning)
		}
		if k.set.Changed("logging-format") {
			cfg.Logging.Format = k.cfg.Logging.Format
		}
	}
	if k.verbosity == 0 {
		k.verbosity = int(cfg.Logging.Verbosity)
	}
	cfg.Logging.Verbosity = logsapi.VerbosityLevel(k.verbosity)
	if k.hostname != "" {
		cfg.HostnameOverride = k.hostname
	}
	if err := config.Validate(cfg); err != nil {
		return nil, nil, nil, k.name(err)
	}
	return cfg, raw, append(said, k.ignored()...), nil
}

// fold takes over the flags whose variables are not the configuration's.
func (k *kubeFlags) fold() {
	c := k.cfg
	for _, name := range []struct {
		to   *string
		from string
	}{{(*string)(&c.Mode), k.mode}, {(*string)(&c.DetectLocalMode), k.localMode}} {
		*name.to = name.from
	}
	c.IPVS.ExcludeCIDRs = k.excludeCIDRs
	if k.healthzPort == 0 {
		c.HealthzBindAddress = ""
	} else if c.HealthzBindAddress != "" {
		c.HealthzBindAddress = config.WithPort(c.HealthzBindAddress, "", k.healthzPort)
	}
	if k.metricsPort == 0 {
		c.MetricsBindAddress = ""
	} else if c.MetricsBindAddress != "" {
		c.MetricsBindAddress = config.WithPort(c.MetricsBindAddress, "", k.metricsPort)
	}
}

// name says of each fault which flag or which file it is in.
func (k *kubeFlags) name(err error) error {
	lines := strings.Split(err.Error(), "\n")
	for i, line := range lines {
		if k.file != "" {
			lines[i] = k.file + ": " + line
			continue
		}
		field, rest, _ := strings.Cut(line, ": ")
		field, _, _ = strings.Cut(field, "[")
		if flag, ok := flagOf()[field]; ok {
			lines[i] = "--" + flag + "=" + rest
		}
	}
	return fmt.Errorf("%s", strings.Join(lines, "\n"))
}

// ignored says which of the flags that were given have no effect.
func (k *kubeFlags) ignored() []string {
	var idle, overruled []string
	backed := append(idleFlags(), "proxy-mode", "kubeconfig", "kube-api-content-type", "kube-api-qps", "masquerade-all",
		"iptables-localhost-nodeports", "conntrack-tcp-be-liberal", "bind-address-hard-fail", "profiling", "ipvs-scheduler", "ipvs-strict-arp", "healthz-port", "metrics-port")
	for _, flag := range flagOf() {
		backed = append(backed, flag)
	}
	k.set.Visit(func(f *pflag.Flag) {
		switch {
		case k.file != "" && slices.Contains(backed, f.Name) && !slices.Contains(besideConfig(), f.Name):
			overruled = append(overruled, "--"+f.Name)
		case slices.Contains(idleFlags(), f.Name):
			idle = append(idle, "--"+f.Name)
		}
	})
	var said []string
	if len(overruled) > 0 {
		said = append(said, "ignored because --config is given: "+strings.Join(overruled, " "))
	}
	if len(idle) > 0 {
		said = append(said, "accepted, and without effect in kptrace: "+strings.Join(idle, " "))
	}
	return said
}

// values are all flags of the process and their values.
func (k *kubeFlags) values() map[string]string {
	values := map[string]string{}
	k.set.VisitAll(func(f *pflag.Flag) { values[f.Name] = f.Value.String() })
	return values
}

// level is the least level that is logged.
func (k *kubeFlags) level(verbose bool) slog.Level { return levelOf(k.verbosity, verbose) }

// levelOf is the least level that is logged at kube-proxy's verbosity n.
func levelOf(n int, verbose bool) slog.Level {
	if verbose || n >= 4 {
		return slog.LevelDebug
	}
	return slog.LevelInfo
}

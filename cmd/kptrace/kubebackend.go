package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/kptrace/kptrace/node"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/kube/config"
)

// chooseMode reads the wanted mode. A kube-proxy's mode that kptrace does not
// have may be replaced: fallback then says why it is.
func chooseMode(text string, mayFallBack bool) (wanted proxy.Mode, fallback string, err error) {
	switch {
	case text == "":
		return proxy.IPTables, "", nil
	case text != config.ModeNFTables:
		wanted, err = proxy.ParseMode(text)
		return wanted, "", err
	case !mayFallBack:
		return "", "", fmt.Errorf("mode %q is none of kptrace's: use iptables, which iptables-nft programs into nf_tables too, ipvs or userspace, or leave out --mode-fallback=false", text)
	}
	return config.ModeNFTables, "kptrace has no such mode", nil
}

// fromNFTables takes what is configured for the nftables mode over to that of
// iptables, which runs in its place: its marks and periods, and node ports on the
// node's own addresses alone where nothing else is said.
func fromNFTables(c *config.Config) *config.Config {
	c = c.DeepCopy()
	c.IPTables.MasqueradeBit, c.IPTables.MasqueradeAll = c.NFTables.MasqueradeBit, c.NFTables.MasqueradeAll
	c.IPTables.SyncPeriod, c.IPTables.MinSyncPeriod = c.NFTables.SyncPeriod, c.NFTables.MinSyncPeriod
	if len(c.NodePortAddresses) == 0 {
		c.NodePortAddresses = []string{config.NodePortsPrimary}
	}
	return c
}

// choice is the mode that runs, and why it is not the wanted one.
type choice struct {
	wanted, mode proxy.Mode
	fallback     string
}

// fallTo goes on to the next mode, as kube-proxy did: from ipvs to iptables to
// userspace.
func (c *choice) fallTo(m proxy.Mode, why string) {
	if c.fallback != "" {
		why = c.fallback + "; and mode " + string(c.mode) + " cannot run either: " + why
	}
	c.mode, c.fallback = m, why
}

// tryIPTables finds out whether the kernel has what the iptables mode needs, and
// falls back to userspace where it has not. Whatever else fails is not for
// another mode to mend: each needs iptables.
func (f *proxyFlags) tryIPTables(ctx context.Context, b *iptables.Dual, c *choice) error {
	if f.dryRun || c.mode != proxy.IPTables {
		return nil
	}
	why, err := b.Lacks(ctx)
	if why == "" || err != nil {
		return ctx.Err() // an error comes again when rules are programmed
	}
	if !f.modeFallback {
		return fmt.Errorf("mode iptables cannot run here: %s; mend that, use --mode userspace, or leave out --mode-fallback=false", why)
	}
	c.fallTo(proxy.Userspace, why)
	return nil
}

// backendConfig says what is programmed. The configuration is valid.
func (f *proxyFlags) backendConfig(c *config.Config) (iptables.Config, error) {
	cfg := iptables.Config{
		Flavour: f.flavour, TakeOver: f.takeOver,
		Trace: f.trace, NFLogGroup: f.group,
		MasqueradeAll: c.IPTables.MasqueradeAll, MasqueradeMark: 1 << *c.IPTables.MasqueradeBit,
		LocalhostNodePorts: *c.IPTables.LocalhostNodePorts, KeepInvalid: c.Conntrack.TCPBeLiberal,
	}
	if !f.dryRun {
		cfg.KeepInvalid = cfg.KeepInvalid || liberal()
	}
	if err := checkFlavour(f.flavour); err != nil {
		return cfg, err
	}
	cfg.LocalMode = iptables.LocalMode(c.DetectLocalMode)
	switch cfg.LocalMode {
	case iptables.LocalBridge:
		cfg.PodInterface = c.DetectLocal.BridgeInterface
	case iptables.LocalPrefix:
		cfg.PodInterface = c.DetectLocal.InterfaceNamePrefix
	}
	for s := range strings.SplitSeq(c.ClusterCIDR, ",") {
		if p, err := netip.ParsePrefix(s); err == nil {
			cfg.ClusterCIDRs = append(cfg.ClusterCIDRs, p)
		}
	}
	for _, s := range c.NodePortAddresses {
		if p, err := netip.ParsePrefix(s); err == nil {
			cfg.NodePortAddresses = append(cfg.NodePortAddresses, p.Masked())
		} else {
			cfg.NodePortPrimary = true // the only word that is valid
		}
	}
	if !f.dryRun {
		cfg.LocalAddrs = iptables.InterfaceAddrs
	}
	return cfg, nil
}

// liberal reports whether connection tracking calls no packet of a connection
// invalid for its sequence numbers.
func liberal() bool {
	b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal")
	return err == nil && strings.TrimSpace(string(b)) != "0"
}

// dropIn reports whether kptrace stands in for a kube-proxy, so that
// kube-proxy's defaults hold for what it changes and serves on the node.
func (f *proxyFlags) dropIn() bool { return f.manifests == "" || f.kube.file != "" }

// nodeConfig says what the node does, but for its backend and state.
func (f *proxyFlags) nodeConfig(c *config.Config, logger *slog.Logger) (node.Config, error) {
	dropIn := f.dropIn()
	served, err := f.kube.http(c, dropIn)
	if err != nil {
		return node.Config{}, err
	}
	metrics, err := f.metrics.config()
	if err != nil {
		return node.Config{}, usageErr(err)
	}
	exported, err := f.otlp.config(os.Getenv)
	if err != nil {
		return node.Config{}, usageErr(err)
	}
	return node.Config{
		Metrics: metrics, CheckEvery: f.metrics.checkEvery, CheckMaxRules: f.metrics.checkRules, FailureEventsAfter: f.metrics.eventsAfter, OTLP: exported, PathBuffer: f.pathBuffer,
		Version: version, Logger: logger,
		Trace: f.trace, NFLogGroup: f.group, MasqueradeMark: 1 << *c.IPTables.MasqueradeBit,
		Socket: f.socket, HistoryFailures: f.historyFailures, HistorySuccesses: f.historySuccesses,
		NoLocalhost: !localhost(c), ServerHealth: f.serverHealth,
		HealthPorts: prefixes(c.NodePortAddresses),
		HTTP:        served, Sysctls: f.kube.sysctls(c, dropIn),
		SyncPeriod: c.IPTables.SyncPeriod.Duration, MinSyncPeriod: f.kube.minSyncPeriod(c, dropIn),
	}, nil
}

// unusable says of contents of the configuration file that nobody could start with
// them.
func unusable(path string, logger *slog.Logger) func([]byte) bool {
	return func(now []byte) bool {
		c, _, err := config.Decode(now)
		if err == nil {
			err = config.Validate(c)
		}
		if err != nil {
			logger.Error("the configuration file has changed and cannot be used: going on with what it was", "file", path, "err", err)
		}
		return err != nil
	}
}

// localhost reports whether node ports are served on 127.0.0.0/8, for which the
// node needs route_localnet.
func localhost(c *config.Config) bool {
	limited := false
	for _, p := range prefixes(c.NodePortAddresses) {
		if p.Addr().Is4() && (p.Addr().IsLoopback() || p.Contains(netip.AddrFrom4([4]byte{127}))) {
			return *c.IPTables.LocalhostNodePorts
		}
		limited = limited || p.Addr().Is4()
	}
	primary := len(c.NodePortAddresses) == 1 && len(prefixes(c.NodePortAddresses)) == 0
	return *c.IPTables.LocalhostNodePorts && !limited && !primary
}

// prefixes are those of a list that are CIDRs.
func prefixes(list []string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		if p, err := netip.ParsePrefix(s); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}

// writeConfig writes the configuration for --write-config-to, in full: the
// modes stand there as they are used.
func writeConfig(path string, c *config.Config) error {
	b, err := config.Encode(config.Effective(c))
	if err != nil {
		return err
	}
	return replaceFile(path, b)
}

// replaceFile writes a file whole or not at all: what was there before stays
// where the disk takes no more.
func replaceFile(path string, b []byte) error {
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return os.WriteFile(path, b, 0o644) // a device or a pipe
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // it is gone where all went well
	_, err = f.Write(b)
	for _, step := range []func() error{f.Sync, func() error { return f.Chmod(0o644) }, f.Close} {
		if e := step(); err == nil {
			err = e
		}
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

func newLogger(w io.Writer, format string, level slog.Leveler) *slog.Logger {
	opts := &slog.HandlerOptions{Level: level}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

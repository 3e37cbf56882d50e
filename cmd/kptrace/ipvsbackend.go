package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/kptrace/kptrace/node"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/ipvs"
	"github.com/kptrace/kptrace/proxy/kube/config"
)

// ipvsFlags are the flags of the IPVS mode that kube-proxy does not have.
type ipvsFlags struct{ grace time.Duration }

func (f *ipvsFlags) add(fl *pflag.FlagSet) {
	fl.DurationVar(&f.grace, "ipvs-graceful-period", ipvs.DefaultGracePeriod, "ipvs mode: how long an endpoint that is gone may keep its connections; it gets no new ones")
}

// addIPVS defines kube-proxy's flags of the mode.
func (k *kubeFlags) addIPVS(fl *pflag.FlagSet) {
	c := &k.cfg.IPVS
	fl.StringVar(&c.Scheduler, "ipvs-scheduler", "", "ipvs mode: how to pick an endpoint, such as rr, wrr, lc, wlc, sh or mh (default rr); a Service's annotation kptrace.dev/ipvs-scheduler goes before")
	fl.StringSliceVar(&k.excludeCIDRs, "ipvs-exclude-cidrs", nil, "ipvs mode: ranges in which virtual servers are never removed; those of others are left alone anyway")
	fl.BoolVar(&c.StrictARP, "ipvs-strict-arp", false, "ipvs mode: answer ARP for addresses of the asked interface alone (arp_ignore 1, arp_announce 2)")
	fl.DurationVar(&c.TCPTimeout.Duration, "ipvs-tcp-timeout", 0, "ipvs mode: timeout of idle TCP connections, 0 to leave")
	fl.DurationVar(&c.TCPFinTimeout.Duration, "ipvs-tcpfin-timeout", 0, "ipvs mode: timeout of TCP connections after a FIN, 0 to leave")
	fl.DurationVar(&c.UDPTimeout.Duration, "ipvs-udp-timeout", 0, "ipvs mode: timeout of UDP, 0 to leave")
	fl.DurationVar(&c.SyncPeriod.Duration, "ipvs-sync-period", c.SyncPeriod.Duration, "ipvs mode: half the time after which a change that the kernel has not taken makes healthz fail")
	fl.DurationVar(&c.MinSyncPeriod.Duration, "ipvs-min-sync-period", 0, "ipvs mode: least time between two syncs (default 100ms)")
}

// ipvsBackend makes the IPVS mode; ipt is what the iptables mode would do here,
// much of which holds for both. An error is wrong usage.
func (f *proxyFlags) ipvsBackend(c *config.Config, ipt *iptables.Config, logger *slog.Logger) (*ipvs.Backend, error) {
	cfg := ipvs.Config{
		Flavour: ipt.Flavour, TakeOver: f.takeOver, Scheduler: c.IPVS.Scheduler,
		TCPTimeout: c.IPVS.TCPTimeout.Duration, TCPFinTimeout: c.IPVS.TCPFinTimeout.Duration, UDPTimeout: c.IPVS.UDPTimeout.Duration,
		GracePeriod:   f.ipvs.grace,
		Detect:        proxy.DetectConfig{Mode: ipt.LocalMode, ClusterCIDRs: ipt.ClusterCIDRs, Interface: ipt.PodInterface},
		MasqueradeAll: ipt.MasqueradeAll, MasqueradeMark: ipt.MasqueradeMark,
		NodePorts: proxy.NodePortConfig{Ranges: ipt.NodePortAddresses, Primary: ipt.NodePortPrimary},
		Trace:     ipt.Trace, NFLogGroup: ipt.NFLogGroup, Logger: logger,
	}
	if f.ipvs.grace <= 0 {
		return nil, fmt.Errorf("--ipvs-graceful-period=%v: give a time above 0", f.ipvs.grace)
	}
	if !f.dryRun {
		cfg.NodePorts.LocalAddrs = ipvs.LocalAddrs
	}
	for _, s := range c.IPVS.ExcludeCIDRs {
		if p, err := netip.ParsePrefix(s); err == nil {
			cfg.ExcludeCIDRs = append(cfg.ExcludeCIDRs, p.Masked())
		}
	}
	b, err := ipvs.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("--ipvs-scheduler: %w", err)
	}
	return b, nil
}

// tryIPVS finds out whether the IPVS mode can run here. Where it cannot and may
// be replaced, fallback says why it is.
func (f *proxyFlags) tryIPVS(ctx context.Context, b *ipvs.Backend) (fallback string, err error) {
	if f.dryRun {
		return "", nil
	}
	_, _, err = b.Preflight(ctx)
	if err == nil || ctx.Err() != nil {
		return "", err
	}
	why := strings.TrimPrefix(err.Error(), "proxy/ipvs: ")
	if !f.modeFallback {
		return "", fmt.Errorf("mode ipvs cannot run here: %s; mend that, use --mode iptables, or leave out --mode-fallback=false", why)
	}
	return why, nil
}

// forIPVS changes what a node does so that it suits the IPVS mode.
func forIPVS(cfg *node.Config, c *config.Config) {
	cfg.NoLocalhost = true // IPVS serves no node ports there
	cfg.SyncPeriod, cfg.MinSyncPeriod = c.IPVS.SyncPeriod.Duration, c.IPVS.MinSyncPeriod.Duration
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	for _, s := range ipvs.Sysctls(c.IPVS.StrictARP, string(release)) {
		cfg.Sysctls = append(cfg.Sysctls, node.Sysctl{Name: s.Name, Value: s.Value})
	}
}

package main

import (
	"os"
	"runtime"
	"strconv"
	"time"

	"github.com/kptrace/kptrace/node"
	"github.com/kptrace/kptrace/proxy/kube/config"
)

// maxConntrack caps what conntrack-max-per-core may come to, as in kube-proxy
// since 1.36.
const maxConntrack = 1 << 20

// sysctls are the conntrack settings that the configuration asks for. Where
// kptrace is no stand-in for a kube-proxy, only those whose flags were given.
func (k *kubeFlags) sysctls(cfg *config.Config, dropIn bool) []node.Sysctl {
	c := &cfg.Conntrack
	var list []node.Sysctl
	add := func(flag, name string, value int) {
		if value > 0 && (dropIn || k.set.Changed(flag)) {
			list = append(list, node.Sysctl{Name: "net/netfilter/" + name, Value: strconv.Itoa(value)})
		}
	}
	seconds := func(d time.Duration) int { return int(d / time.Second) }
	limit := conntrackMax(int(*c.MaxPerCore), int(*c.Min), runtime.NumCPU())
	add("conntrack-max-per-core", "nf_conntrack_max", limit)
	if len(list) > 0 {
		list[0].Optional = true
		list = append(list, node.Sysctl{
			Name: "net/netfilter/nf_conntrack_buckets", Value: strconv.Itoa(limit / 4), AtLeast: true, Optional: true,
		})
	}
	add("conntrack-tcp-timeout-established", "nf_conntrack_tcp_timeout_established", seconds(c.TCPEstablishedTimeout.Duration))
	add("conntrack-tcp-timeout-close-wait", "nf_conntrack_tcp_timeout_close_wait", seconds(c.TCPCloseWaitTimeout.Duration))
	add("conntrack-udp-timeout", "nf_conntrack_udp_timeout", seconds(c.UDPTimeout.Duration))
	add("conntrack-udp-timeout-stream", "nf_conntrack_udp_timeout_stream", seconds(c.UDPStreamTimeout.Duration))
	if c.TCPBeLiberal {
		add("conntrack-tcp-be-liberal", "nf_conntrack_tcp_be_liberal", 1)
	}
	return list
}

// conntrackMax is the limit for a number of CPUs, 0 to leave it as it is.
func conntrackMax(perCore, least, cpus int) int {
	switch {
	case perCore == 0:
		return 0
	case perCore*cpus > maxConntrack:
		return maxConntrack
	}
	return max(perCore*cpus, least)
}

// http says what is served where.
func (k *kubeFlags) http(cfg *config.Config, dropIn bool) (node.HTTPConfig, error) {
	h := node.HTTPConfig{HardFail: cfg.BindAddressHardFail, Profiling: cfg.EnableProfiling, Flags: k.values()}
	if dropIn || k.set.Changed("healthz-bind-address") {
		h.Healthz = cfg.HealthzBindAddress
	}
	if dropIn || k.set.Changed("metrics-bind-address") {
		h.Metrics = cfg.MetricsBindAddress
	}
	var err error
	h.Configz, err = config.Configz(cfg)
	return h, err
}

// adjustOOM tells the kernel how ready to be to kill this process.
func (k *kubeFlags) adjustOOM(cfg *config.Config, dropIn bool) error {
	if !dropIn && !k.set.Changed("oom-score-adj") {
		return nil
	}
	return os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(int(*cfg.OOMScoreAdj))), 0o644)
}

// minSyncPeriod is the least time between syncs, 0 for kptrace's own default.
func (k *kubeFlags) minSyncPeriod(cfg *config.Config, dropIn bool) time.Duration {
	if !dropIn && !k.set.Changed("iptables-min-sync-period") {
		return 0
	}
	return cfg.IPTables.MinSyncPeriod.Duration
}

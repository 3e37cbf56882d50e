package iptables

import (
	"net/netip"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// LocalMode is proxy.LocalMode, for Config.
type LocalMode = proxy.LocalMode

// The modes; see package proxy.
const (
	LocalClusterCIDR = proxy.LocalClusterCIDR
	LocalNodeCIDR    = proxy.LocalNodeCIDR
	LocalBridge      = proxy.LocalBridge
	LocalPrefix      = proxy.LocalPrefix
)

// detector writes the matches of a local detector.
type detector struct{ proxy.Detector }

func (c *Config) detector(node *proxy.Node) detector {
	by := proxy.DetectConfig{Mode: c.LocalMode, ClusterCIDRs: c.ClusterCIDRs, Interface: c.PodInterface}
	return detector{by.For(node, c.Family == xtables.IPv6)}
}

// source and device are the two places in a rule of which one has the match,
// behind not, which is "" or "!".
func (d detector) source(not string) string {
	if !d.CIDR.IsValid() {
		return ""
	}
	return line(not, from(d.CIDR))
}

func (d detector) device(not string) string {
	if d.Interface == "" {
		return ""
	}
	return line(not, "-i", d.Interface)
}

// nodePorts says which addresses serve node ports.
func (c *Config) nodePorts() *proxy.NodePortConfig {
	return &proxy.NodePortConfig{Ranges: c.NodePortAddresses, Primary: c.NodePortPrimary, LocalAddrs: c.LocalAddrs}
}

// nodePortRanges are the ranges to which node ports are limited, none for all.
func (r *renderer) nodePortRanges() []netip.Prefix {
	return r.cfg.nodePorts().Limits(&r.node, r.cfg.Family == xtables.IPv6)
}

// nodePortAddrs are the addresses that serve node ports where not all do.
func (r *renderer) nodePortAddrs() []netip.Addr {
	return r.cfg.nodePorts().Addrs(&r.node, r.cfg.Family == xtables.IPv6, r.localhost())
}

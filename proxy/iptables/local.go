package iptables

import (
	"net/netip"
	"strings"

	"github.com/kptrace/kptrace/proxy"
)

// LocalMode is how the traffic of pods is told from other traffic, as
// kube-proxy's detectLocalMode says it. Traffic to a cluster IP that is not
// local is masqueraded; where nothing tells, none is.
type LocalMode string

// The modes. The zero value is LocalClusterCIDR.
const (
	// LocalClusterCIDR takes for local what comes from the first of
	// Config.ClusterCIDRs.
	LocalClusterCIDR LocalMode = "ClusterCIDR"
	// LocalNodeCIDR takes what comes from the first of the node's PodCIDRs.
	LocalNodeCIDR LocalMode = "NodeCIDR"
	// LocalBridge takes what comes in by the interface Config.PodInterface.
	LocalBridge LocalMode = "BridgeInterface"
	// LocalPrefix takes what comes in by an interface whose name begins with
	// Config.PodInterface.
	LocalPrefix LocalMode = "InterfaceNamePrefix"
)

// detector is a local detector for one node. Its zero value tells nothing.
type detector struct {
	cidr netip.Prefix
	// iface is a name as iptables takes it after -i.
	iface string
}

// detector returns the detector of the Config's family. Of several ranges the
// first one of the family counts.
func (c *Config) detector(node *proxy.Node) detector {
	ranges := c.ClusterCIDRs
	switch c.LocalMode {
	case LocalBridge:
		return detector{iface: c.PodInterface}
	case LocalPrefix:
		if c.PodInterface == "" {
			return detector{}
		}
		return detector{iface: c.PodInterface + "+"}
	case LocalNodeCIDR:
		ranges = node.PodCIDRs
	}
	for _, p := range ranges {
		if p.IsValid() && p.Bits() > 0 && c.ours(p.Addr()) {
			return detector{cidr: p.Masked()}
		}
	}
	return detector{}
}

// tells reports whether there is anything to tell by.
func (d detector) tells() bool { return d.cidr.IsValid() || d.iface != "" }

// source and device are the two places in a rule of which one has the match,
// behind not, which is "" or "!".
func (d detector) source(not string) string {
	if !d.cidr.IsValid() {
		return ""
	}
	return line(not, from(d.cidr))
}

func (d detector) device(not string) string {
	if d.iface == "" {
		return ""
	}
	return line(not, "-i", d.iface)
}

// local reports whether a packet is local.
func (d detector) local(pkt *proxy.Packet) bool {
	if name, prefix := strings.CutSuffix(d.iface, "+"); prefix {
		return strings.HasPrefix(pkt.In, name) && !pkt.FromNode
	}
	if d.iface != "" {
		return pkt.In == d.iface && !pkt.FromNode
	}
	return d.cidr.Contains(pkt.Src.Addr())
}

package proxy

import (
	"net/netip"
	"strings"
)

// LocalMode is how the traffic of pods is told from other traffic, as
// kube-proxy's detectLocalMode says it. Traffic to a cluster IP that is not
// local is masqueraded; where nothing tells, none is.
type LocalMode string

// The modes. The zero value is LocalClusterCIDR.
const (
	// LocalClusterCIDR takes for local what comes from the first of
	// DetectConfig.ClusterCIDRs.
	LocalClusterCIDR LocalMode = "ClusterCIDR"
	// LocalNodeCIDR takes what comes from the first of the node's PodCIDRs.
	LocalNodeCIDR LocalMode = "NodeCIDR"
	// LocalBridge takes what comes in by the interface DetectConfig.Interface.
	LocalBridge LocalMode = "BridgeInterface"
	// LocalPrefix takes what comes in by an interface whose name begins with
	// DetectConfig.Interface.
	LocalPrefix LocalMode = "InterfaceNamePrefix"
)

// DetectConfig says by what the traffic of pods is told.
type DetectConfig struct {
	Mode         LocalMode
	ClusterCIDRs []netip.Prefix
	Interface    string
}

// Detector is a local detector for one node and address family. Its zero value
// tells nothing.
type Detector struct {
	CIDR netip.Prefix
	// Interface is a name as iptables takes it after -i: one that ends in "+"
	// is a prefix.
	Interface string
}

// For returns the detector of a node and family. Of several ranges the first
// one of the family counts.
func (c *DetectConfig) For(node *Node, ip6 bool) Detector {
	ranges := c.ClusterCIDRs
	switch c.Mode {
	case LocalBridge:
		return Detector{Interface: c.Interface}
	case LocalPrefix:
		if c.Interface == "" {
			return Detector{}
		}
		return Detector{Interface: c.Interface + "+"}
	case LocalNodeCIDR:
		ranges = node.PodCIDRs
	}
	for _, p := range ranges {
		if p.IsValid() && p.Bits() > 0 && p.Addr().Is6() == ip6 && !p.Addr().Is4In6() {
			return Detector{CIDR: p.Masked()}
		}
	}
	return Detector{}
}

// Tells reports whether there is anything to tell by.
func (d Detector) Tells() bool { return d.CIDR.IsValid() || d.Interface != "" }

// Local reports whether a packet is local.
func (d Detector) Local(pkt *Packet) bool {
	if name, prefix := strings.CutSuffix(d.Interface, "+"); prefix {
		return strings.HasPrefix(pkt.In, name) && !pkt.FromNode
	}
	if d.Interface != "" {
		return pkt.In == d.Interface && !pkt.FromNode
	}
	return d.CIDR.Contains(pkt.Src.Addr())
}

package proxytest

import (
	"net/netip"

	"github.com/kptrace/kptrace/proxy"
)

// The world in which all rows play: one node with its pods, pods on another
// node that are reached by routing, and clients outside.
var (
	// ClusterCIDR holds all pods, PodCIDR those of the node.
	ClusterCIDR = netip.MustParsePrefix("10.244.0.0/16")
	PodCIDR     = netip.MustParsePrefix("10.244.1.0/24")
	// NodeAddr is the node's address for outside clients.
	NodeAddr = netip.MustParseAddr("192.0.2.1")
)

// Source is who sends a packet.
type Source string

// The sources. Those that name a pod are also places where endpoints run.
const (
	// FromPod is a pod on the node that serves nothing.
	FromPod Source = "pod"
	// FromA and FromB are pods on the node that serve, FromC one elsewhere.
	FromA Source = "a"
	FromB Source = "b"
	FromC Source = "c"
	// FromOutside is a client inside 203.0.113.0/24, FromElsewhere one that
	// is not.
	FromOutside   Source = "outside"
	FromElsewhere Source = "elsewhere"
	// FromNode is a process on the node.
	FromNode Source = "node"
)

// Addr returns the address from which a source sends.
func (s Source) Addr() netip.Addr {
	return netip.MustParseAddr(map[Source]string{
		FromPod: "10.244.1.10", FromA: "10.244.1.2", FromB: "10.244.1.3", FromC: "10.244.2.2",
		FromOutside: "203.0.113.9", FromElsewhere: "198.18.0.9", FromNode: NodeAddr.String(),
	}[s])
}

// Sources lists all of them.
func Sources() []Source {
	return []Source{FromPod, FromA, FromB, FromC, FromOutside, FromElsewhere, FromNode}
}

// Node is the node of the world.
func Node() proxy.Node {
	return proxy.Node{Name: "node1", Zone: "zone1", Addrs: []netip.Addr{NodeAddr}, PodCIDRs: []netip.Prefix{PodCIDR}}
}

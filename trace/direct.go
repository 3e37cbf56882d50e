package trace

import (
	"net/netip"

	"github.com/kptrace/kptrace/conntrack"
)

// Target is an endpoint as connections straight to it are counted.
type Target struct {
	Proto conntrack.Proto
	Addr  netip.AddrPort
}

// Direct counts connections made to an endpoint's own address, past every Service,
// by their clients: pods of this node, the node itself, as with kubelet's probes,
// and others. What comes from other nodes may have gone through a Service there.
type Direct struct {
	Pods, Node, Elsewhere uint64
}

// Total is the number of all.
func (d Direct) Total() uint64 { return d.Pods + d.Node + d.Elsewhere }

// Add returns the sum.
func (d Direct) Add(o Direct) Direct {
	return Direct{d.Pods + o.Pods, d.Node + o.Node, d.Elsewhere + o.Elsewhere}
}

// Since returns how many came after an earlier count.
func (d Direct) Since(o Direct) Direct {
	return Direct{d.Pods - min(o.Pods, d.Pods), d.Node - min(o.Node, d.Node), d.Elsewhere - min(o.Elsewhere, d.Elsewhere)}
}

package ipvs

import (
	"net/netip"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// walkKey is all of a packet that our rules look at.
type walkKey struct {
	unit         *unit // nil where no Service claims the packet
	dst          netip.AddrPort
	proto        conntrack.Proto
	fromNode, lo bool
	source       sourceClass
}

// sourceClass is what our rules can tell about a source address.
type sourceClass struct {
	// special is the address where it is an endpoint's or one of the Service's
	// own.
	special         netip.Addr
	local, loopback bool
	inCluster       bool
	ranged          bool
}

func (f *familyProgram) sourceOf(pkt *proxy.Packet, u *unit) sourceClass {
	src := pkt.Src.Addr()
	c := sourceClass{local: f.isLocal(src) || f.bound[src], loopback: src.IsLoopback(), inCluster: f.detector.Local(pkt)}
	if u == nil {
		return c
	}
	if src == pkt.Dst.Addr() {
		c.special = src
	}
	for i := range u.entries {
		e := &u.entries[i]
		switch {
		case e.set == setLoopBack && e.ip == src, e.set == setClusterIP && e.ip == src, e.set == setSourceIP && e.ip == src:
			c.special = src
		case e.set == setSourceCIDR && e.ip == pkt.Dst.Addr() && netip.PrefixFrom(e.other, int(e.bits)).Contains(src):
			c.ranged = true
		}
	}
	return c
}

package node

import (
	"net/netip"
	"slices"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// virtualServers returns the virtual servers of IPVS, as they were at most a
// few seconds ago, with the Services they stand for; none in other modes.
func (t *tracer) virtualServers() []trace.VirtualServer {
	live := t.live.Load()
	if live == nil || live.ipvs == nil {
		return nil
	}
	all := slices.Clone(live.ipvs.Servers())
	views := t.views()
	for i := range all {
		v := &all[i]
		// Any client will do: to which Service an address belongs depends on none.
		from := netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
		if v.Addr.Addr().Is6() {
			from = netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
		}
		for _, view := range views {
			o := view.Program.Walk(proxy.Packet{Proto: v.Proto, Src: from, Dst: v.Addr, FromNode: true})
			if v.Service = o.Service; o.Verdict != proxy.Pass {
				break
			}
		}
	}
	return all
}

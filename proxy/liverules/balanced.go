package liverules

import (
	"net/netip"
	"slices"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Balanced returns every way of a first packet that IPVS is to send to an endpoint.
// IPVS takes it behind INPUT's filter, or behind OUTPUT's nat where the node itself
// sent it, and sends it on by OUTPUT, never through FORWARD; nat of OUTPUT is not asked
// again (net/netfilter/ipvs/ip_vs_core.c: ip_vs_ops4; ip_vs_xmit.c:
// ip_vs_nat_send_or_cont). Each Way has the endpoint, also where a rule stops the
// packet before IPVS. Ways by which a rule leads elsewhere have what that says.
func (p *Program) Balanced(pkt proxy.Packet, to netip.AddrPort) []Way {
	f := p.family(pkt.Dst.Addr())
	if f == nil {
		return nil
	}
	in := first(pkt)
	before := xtables.Sent()[:3]
	if !pkt.FromNode {
		before = xtables.Received()[:6]
	}
	after := slices.DeleteFunc(xtables.Sent(), func(s xtables.Station) bool { return s.Chain == "OUTPUT" && s.Table == "nat" })
	after[0].Route = true
	var ways []Way
	for _, head := range p.walk(f, in, before, p.oracles(f, pkt.FromNode, xtables.No)) {
		if head.Verdict != xtables.Accept {
			w := p.way(&head)
			w.Endpoint = to
			ways = append(ways, w)
			continue
		}
		if head.Packet.Dst != in.Dst || head.Packet.DPort != in.DPort {
			ways = append(ways, p.way(&head))
			continue
		}
		next := head.Packet
		next.In, next.Out, next.Dst, next.DPort = "", "", to.Addr(), to.Port()
		for _, leaf := range p.walk(f, next, after, p.oracles(f, true, xtables.Yes)) {
			for i := range leaf.Assumptions {
				leaf.Assumptions[i].After += len(head.Steps)
			}
			leaf.Probability *= head.Probability
			leaf.Steps = slices.Concat(head.Steps, leaf.Steps)
			leaf.Assumptions = slices.Concat(head.Assumptions, leaf.Assumptions)
			w := p.way(&leaf)
			if w.Endpoint = to; w.Verdict == proxy.Pass && !w.Unsure {
				w.Verdict = proxy.Forward
			}
			ways = append(ways, w)
		}
	}
	return ways
}

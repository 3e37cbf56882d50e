package check

import (
	"net/netip"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// Balanced is one server of an IPVS virtual server.
type Balanced struct {
	Proto           conntrack.Proto
	Virtual, Server netip.AddrPort
	Forwarding      trace.Forwarding
}

// forwarding looks for servers that IPVS does not reach by NAT.
func (c *checker) forwarding() {
	for _, s := range c.Balanced {
		if s.Forwarding == trace.ForwardNAT || s.Forwarding == trace.ForwardUnknown || s.Forwarding == trace.ForwardLocal && s.Virtual.Port() == s.Server.Port() {
			continue
		}
		c.add("not-nat", s.Virtual.String()+"/"+s.Proto.String(),
			"ipvsadm -e with -m makes it NAT; whoever wrote it will want the same",
			"IPVS sends packets for %s to the server %s by %s, which translates nothing: the pod must know that address and listen at that very port",
			s.Virtual, s.Server, s.Forwarding)
	}
}

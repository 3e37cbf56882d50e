package beside

import (
	"fmt"
	"net/netip"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// member is a member of one of our sets. It is comparable.
type member struct {
	set   string
	proto conntrack.Proto
	addr  netip.AddrPort
}

// String writes the member as ipset does.
func (m member) String() string {
	return fmt.Sprintf("%s,%s:%d", m.addr.Addr(), m.proto, m.addr.Port())
}

// members lists what belongs into our sets: every address that Services have on
// a node with the given addresses, and all endpoints.
func members(s *proxy.Snapshot, local []netip.Addr) map[member]bool {
	all := make(map[member]bool)
	for i := range s.Services {
		svc := &s.Services[i]
		front := func(ip netip.Addr, port uint16) {
			if ip.IsValid() && port != 0 && ip.Is6() == svc.Is6() {
				all[member{setName(setVirtual, svc.Is6()), svc.Name.Proto, netip.AddrPortFrom(ip, port)}] = true
			}
		}
		front(svc.ClusterIP, svc.Port)
		for _, ips := range [][]netip.Addr{svc.ExternalIPs, svc.LoadBalancerIPs} {
			for _, ip := range ips {
				front(ip, svc.Port)
			}
		}
		for _, ip := range local {
			front(ip.Unmap(), svc.NodePort)
		}
		for j := range svc.Endpoints {
			all[member{setName(setReal, svc.Is6()), svc.Name.Proto, svc.Endpoints[j].Addr}] = true
		}
	}
	return all
}

package proxy

import (
	"net/netip"

	"github.com/kptrace/kptrace/conntrack"
)

// UDPFrontends returns the UDP addresses of all Services and the endpoints that
// serve each, whatever policies and topology make of them: an endpoint that
// serves may keep its clients.
func (s *Snapshot) UDPFrontends() conntrack.Frontends {
	out := make(conntrack.Frontends)
	for i := range s.Services {
		svc := &s.Services[i]
		if svc.Name.Proto != conntrack.UDP {
			continue
		}
		backends := make(conntrack.Backends, len(svc.Endpoints))
		for j := range svc.Endpoints {
			if ep := &svc.Endpoints[j]; ep.Ready || ep.Serving {
				backends[ep.Addr] = struct{}{}
			}
		}
		add := func(addr netip.AddrPort) {
			if _, taken := out[addr]; !taken { // as the rules do
				out[addr] = backends
			}
		}
		add(netip.AddrPortFrom(svc.ClusterIP, svc.Port))
		for _, ips := range [][]netip.Addr{svc.ExternalIPs, svc.LoadBalancerIPs} {
			for _, ip := range ips {
				add(netip.AddrPortFrom(ip, svc.Port))
			}
		}
		if svc.NodePort != 0 {
			add(conntrack.NodePort(svc.ClusterIP, svc.NodePort))
		}
	}
	return out
}

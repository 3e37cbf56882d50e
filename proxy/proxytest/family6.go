package proxytest

import (
	"net/netip"
	"slices"

	"github.com/kptrace/kptrace/proxy"
)

// In6 is an IPv4 address of the world in its IPv6 twin.
func In6(a netip.Addr) netip.Addr {
	if !a.Is4() {
		return a
	}
	b := netip.MustParseAddr("fd6b:7074::").As16()
	four := a.As4()
	copy(b[12:], four[:])
	return netip.AddrFrom16(b)
}

// In6Port is an address and port in the IPv6 twin of the world.
func In6Port(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(In6(a.Addr()), a.Port())
}

// In6Prefix is a prefix in the IPv6 twin of the world.
func In6Prefix(p netip.Prefix) netip.Prefix {
	switch {
	case !p.IsValid():
		return p
	case p.Bits() == 0:
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(In6(p.Addr()), p.Bits()+96)
}

func each[T any](list []T, f func(T) T) []T {
	out := slices.Clone(list)
	for i := range out {
		out[i] = f(out[i])
	}
	return out
}

// Cases6 is the table in the IPv6 twin of the world. It lacks what only IPv4
// has, which is node ports on localhost.
func Cases6() []Case {
	cases := Cases()
	for i := range cases {
		cases[i] = cases[i].in6()
	}
	return cases
}

// Snapshot6 is a Snapshot in the IPv6 twin of the world.
func Snapshot6(of *proxy.Snapshot) *proxy.Snapshot {
	s := *of
	s.Node.Addrs, s.Node.PodCIDRs = each(s.Node.Addrs, In6), each(s.Node.PodCIDRs, In6Prefix)
	s.Services = each(s.Services, func(svc proxy.Service) proxy.Service {
		svc.ClusterIP = In6(svc.ClusterIP)
		svc.ExternalIPs, svc.LoadBalancerIPs = each(svc.ExternalIPs, In6), each(svc.LoadBalancerIPs, In6)
		svc.SourceRanges = each(svc.SourceRanges, In6Prefix)
		svc.Endpoints = each(svc.Endpoints, func(ep proxy.Endpoint) proxy.Endpoint {
			ep.Addr = In6Port(ep.Addr)
			return ep
		})
		return svc
	})
	return &s
}

func (c Case) in6() Case {
	c.Setup.Snapshot, c.Setup.ClusterCIDR = Snapshot6(c.Setup.Snapshot), In6Prefix(c.Setup.ClusterCIDR)
	out := make(map[netip.AddrPort]proxy.Outage)
	for addr, why := range c.Setup.Overlay.Out {
		out[In6Port(addr)] = why
	}
	c.Setup.Overlay.Out = out
	var rows []Row
	for _, r := range c.Rows {
		if r.To.Addr().IsLoopback() {
			r.To, r.Want = netip.AddrPortFrom(netip.IPv6Loopback(), r.To.Port()), Want{}
		}
		r.To = In6Port(r.To)
		r.Want.Endpoints = each(r.Want.Endpoints, In6Port)
		rows = append(rows, r)
	}
	c.Rows = rows
	return c
}

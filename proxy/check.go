package proxy

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/kptrace/kptrace/conntrack"
)

// Claim is an address that one Service port has for itself. The address is
// invalid for a node port, which is on all local addresses.
type Claim struct {
	IP    netip.Addr
	Port  uint16
	Proto conntrack.Proto
}

// Owner says whose a Claim is and what kind of address it is.
type Owner struct {
	// Unit numbers the Services that a Checker let pass, from 0.
	Unit int
	Via  Via
}

// Checker takes out of the Services of one address family what cannot be
// programmed, and says so: every mode has the same idea of what is wrong. It
// serves one rendering; the zero value checks IPv4.
type Checker struct {
	// IP6 says that the family is IPv6.
	IP6 bool
	// Claims are the addresses given out so far, Problems what was left out.
	Claims   map[Claim]Owner
	Problems []Problem

	names []PortName // by unit
}

// ours reports whether an address is of the family.
func (c *Checker) ours(a netip.Addr) bool { return a.IsValid() && !a.Is4In6() && a.Is6() == c.IP6 }

func (c *Checker) problem(n PortName, field, format string, args ...any) {
	c.Problems = append(c.Problems, Problem{
		Object: "Service " + n.Namespace + "/" + n.Name, Field: field, Message: fmt.Sprintf(format, args...)})
}

// take claims an address for the next unit.
func (c *Checker) take(n PortName, field string, k Claim, via Via) bool {
	if prior, taken := c.Claims[k]; taken {
		what := netip.AddrPortFrom(k.IP, k.Port).String()
		if !k.IP.IsValid() {
			what = strconv.Itoa(int(k.Port))
		}
		c.problem(n, field, "%s %s is taken by Service %s; choose another", what, k.Proto, c.names[prior.Unit])
		return false
	}
	if c.Claims == nil {
		c.Claims = make(map[Claim]Owner)
	}
	c.Claims[k] = Owner{len(c.names), via}
	return true
}

// Service returns the part of a Service that can be programmed. It is not ok for
// one of the other family, and for one that cannot be programmed at all.
func (c *Checker) Service(s *Service) (svc Service, ok bool) {
	svc = *s
	if !c.ours(svc.ClusterIP) {
		return svc, false
	}
	n := svc.Name
	switch {
	case !printable(n.Namespace) || !printable(n.Name) || n.Port != "" && !printable(n.Port) || len(n.String()) > maxName:
		c.problem(n, "metadata.name", "the name %q cannot be written into a rule", n)
		return svc, false
	case n.Proto != conntrack.TCP && n.Proto != conntrack.UDP && n.Proto != conntrack.SCTP:
		c.problem(n, "spec.ports", "protocol %s cannot be proxied: use TCP, UDP or SCTP", n.Proto)
		return svc, false
	case svc.Port == 0:
		c.problem(n, "spec.ports", "port %q has the number 0; use 1 to 65535", n.Port)
		return svc, false
	}
	if !c.take(n, "spec.clusterIP", Claim{svc.ClusterIP, svc.Port, n.Proto}, ViaClusterIP) {
		return svc, false
	}
	addrs := func(field string, ips []netip.Addr, via Via) []netip.Addr {
		var kept []netip.Addr
		for _, ip := range ips {
			if c.ours(ip) && c.take(n, field, Claim{ip, svc.Port, n.Proto}, via) {
				kept = append(kept, ip)
			}
		}
		return kept
	}
	svc.ExternalIPs = addrs("spec.externalIPs", svc.ExternalIPs, ViaExternalIP)
	svc.LoadBalancerIPs = addrs("status.loadBalancer.ingress", svc.LoadBalancerIPs, ViaLoadBalancer)
	if svc.NodePort != 0 && !c.take(n, "spec.ports.nodePort", Claim{Port: svc.NodePort, Proto: n.Proto}, ViaNodePort) {
		svc.NodePort = 0
	}
	svc.SourceRanges = nil
	for _, p := range s.SourceRanges {
		if p.IsValid() && p.Bits() == 0 && c.ours(p.Addr()) { // everybody
			svc.SourceRanges = nil
			break
		}
		if p.IsValid() && c.ours(p.Addr()) {
			svc.SourceRanges = append(svc.SourceRanges, p.Masked())
		}
	}
	svc.Endpoints = c.endpoints(n, s.Endpoints)
	c.names = append(c.names, n)
	return svc, true
}

// endpoints drops what is no address of the family, and doubles. It copies
// only if it must.
func (c *Checker) endpoints(n PortName, eps []Endpoint) []Endpoint {
	good := func(i int) bool {
		a := eps[i].Addr
		return c.ours(a.Addr()) && a.Addr().Zone() == "" && a.Port() != 0
	}
	double := func(i int) bool {
		return i > 0 && slices.ContainsFunc(eps[:i], func(e Endpoint) bool { return e.Addr == eps[i].Addr })
	}
	sorted := slices.IsSortedFunc(eps, func(a, b Endpoint) int { return a.Addr.Compare(b.Addr) })
	if sorted {
		double = func(i int) bool { return i > 0 && eps[i-1].Addr == eps[i].Addr }
	}
	for i := range eps {
		if good(i) && !double(i) {
			continue
		}
		kept := slices.Clone(eps[:i])
		for ; i < len(eps); i++ {
			switch {
			case !good(i):
				c.problem(n, "endpoints", "%s is no address that can be dialled; the endpoint is left out", eps[i].Addr)
			case !double(i):
				kept = append(kept, eps[i])
			}
		}
		return kept
	}
	return eps
}

// maxName keeps every comment within the 255 bytes of xt_comment
// (linux/netfilter/xt_comment.h).
const maxName = 190

// printable reports whether a name survives iptables-restore in quotes.
func printable(s string) bool {
	for _, r := range s {
		if r <= ' ' || r > '~' || r == '"' || r == '\\' || r == '\'' || r == '%' {
			return false
		}
	}
	return s != ""
}

package userspace

import (
	"fmt"
	"net/netip"
	"strconv"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// claim is an address that one Service port has for itself. The address is
// invalid for a node port, which is on all local addresses; six tells the
// families of those apart.
type claim struct {
	ip    netip.Addr
	six   bool
	port  uint16
	proto conntrack.Proto
}

func familyOf(a netip.Addr) xtables.Family {
	if a.Is6() && !a.Is4In6() {
		return xtables.IPv6
	}
	return xtables.IPv4
}

// owner is a unit and the kind of its address.
type owner struct {
	unit *unit
	via  proxy.Via
}

// checker takes out of Services what cannot be served, and says so.
type checker struct {
	claims   map[claim]owner
	problems []proxy.Problem
}

func (c *checker) problem(n proxy.PortName, field, format string, args ...any) {
	c.problems = append(c.problems, proxy.Problem{
		Object: "Service " + n.Namespace + "/" + n.Name, Field: field, Message: fmt.Sprintf(format, args...),
	})
}

// take claims an address for a unit.
func (c *checker) take(u *unit, field string, k claim, via proxy.Via) bool {
	if prior, taken := c.claims[k]; taken {
		what := netip.AddrPortFrom(k.ip, k.port).String()
		if !k.ip.IsValid() {
			what = strconv.Itoa(int(k.port))
		}
		c.problem(u.svc.Name, field, "%s %s is taken by Service %s; choose another", what, k.proto, prior.unit.svc.Name)
		return false
	}
	c.claims[k] = owner{u, via}
	return true
}

// service makes a unit of what of a Service can be served, nil for nothing.
func (c *checker) service(s *proxy.Service) *unit {
	u := &unit{svc: *s, family: familyOf(s.ClusterIP)}
	svc, n := &u.svc, s.Name
	switch {
	case !printable(n.Namespace) || !printable(n.Name) || n.Port != "" && !printable(n.Port) || len(n.String()) > maxName:
		c.problem(n, "metadata.name", "the name %q cannot be written into a rule", n)
		return nil
	case n.Proto != conntrack.TCP && n.Proto != conntrack.UDP:
		c.problem(n, "spec.ports", "protocol %s is not served by the userspace mode: use TCP or UDP, or another mode", n.Proto)
		return nil
	case svc.Port == 0:
		c.problem(n, "spec.ports", "port %q has the number 0; use 1 to 65535", n.Port)
		return nil
	}
	if !c.take(u, "spec.clusterIP", claim{ip: svc.ClusterIP, port: svc.Port, proto: n.Proto}, proxy.ViaClusterIP) {
		return nil
	}
	ours := func(a netip.Addr) bool { return a.IsValid() && familyOf(a) == u.family }
	addrs := func(field string, ips []netip.Addr, via proxy.Via) []netip.Addr {
		var kept []netip.Addr
		for _, ip := range ips {
			if ours(ip) && c.take(u, field, claim{ip: ip, port: svc.Port, proto: n.Proto}, via) {
				kept = append(kept, ip)
			}
		}
		return kept
	}
	svc.ExternalIPs = addrs("spec.externalIPs", svc.ExternalIPs, proxy.ViaExternalIP)
	svc.LoadBalancerIPs = addrs("status.loadBalancer.ingress", svc.LoadBalancerIPs, proxy.ViaLoadBalancer)
	if svc.NodePort != 0 && !c.take(u, "spec.ports.nodePort",
		claim{six: u.family == xtables.IPv6, port: svc.NodePort, proto: n.Proto}, proxy.ViaNodePort) {
		svc.NodePort = 0
	}
	svc.SourceRanges = nil
	for _, p := range s.SourceRanges {
		if !p.IsValid() || !ours(p.Addr()) {
			continue
		}
		if p.Bits() == 0 { // everybody
			svc.SourceRanges = nil
			break
		}
		svc.SourceRanges = append(svc.SourceRanges, p.Masked())
	}
	svc.Endpoints = nil
	seen := make(map[netip.AddrPort]bool, len(s.Endpoints))
	for i := range s.Endpoints {
		a := s.Endpoints[i].Addr
		switch {
		case !ours(a.Addr()) || a.Addr().Zone() != "" || a.Port() == 0:
			c.problem(n, "endpoints", "%s is no address that can be dialled; the endpoint is left out", a)
		case a == netip.AddrPortFrom(svc.ClusterIP, svc.Port):
			c.problem(n, "endpoints", "%s is the Service itself; the endpoint is left out", a)
		case !seen[a]:
			seen[a] = true
			svc.Endpoints = append(svc.Endpoints, s.Endpoints[i])
		}
	}
	return u
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

package iptables

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// claim is an address that one Service port has for itself. The address is
// invalid for a node port, which is on all local addresses.
type claim struct {
	ip    netip.Addr
	port  uint16
	proto conntrack.Proto
}

// owner is a unit's place in the program and the kind of its address.
type owner struct {
	unit int
	via  proxy.Via
}

// checker takes out of Services what cannot be programmed, and says so.
type checker struct {
	cfg      *Config
	claims   map[claim]owner
	names    []proxy.PortName // by unit
	problems []proxy.Problem
}

func (c *checker) problem(n proxy.PortName, field, format string, args ...any) {
	c.problems = append(c.problems, proxy.Problem{
		Object: "Service " + n.Namespace + "/" + n.Name, Field: field, Message: fmt.Sprintf(format, args...)})
}

// take claims an address for the next unit.
func (c *checker) take(n proxy.PortName, field string, k claim, via proxy.Via) bool {
	if prior, taken := c.claims[k]; taken {
		what := netip.AddrPortFrom(k.ip, k.port).String()
		if !k.ip.IsValid() {
			what = strconv.Itoa(int(k.port))
		}
		c.problem(n, field, "%s %s is taken by Service %s; choose another", what, k.proto, c.names[prior.unit])
		return false
	}
	c.claims[k] = owner{len(c.names), via}
	return true
}

// service returns the part of a Service that can be programmed.
func (c *checker) service(s *proxy.Service) (svc proxy.Service, ok bool) {
	svc = *s
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
	if !c.take(n, "spec.clusterIP", claim{svc.ClusterIP, svc.Port, n.Proto}, proxy.ViaClusterIP) {
		return svc, false
	}
	addrs := func(field string, ips []netip.Addr, via proxy.Via) []netip.Addr {
		var kept []netip.Addr
		for _, ip := range ips {
			if c.cfg.ours(ip) && c.take(n, field, claim{ip, svc.Port, n.Proto}, via) {
				kept = append(kept, ip)
			}
		}
		return kept
	}
	svc.ExternalIPs = addrs("spec.externalIPs", svc.ExternalIPs, proxy.ViaExternalIP)
	svc.LoadBalancerIPs = addrs("status.loadBalancer.ingress", svc.LoadBalancerIPs, proxy.ViaLoadBalancer)
	if svc.NodePort != 0 && !c.take(n, "spec.ports.nodePort", claim{port: svc.NodePort, proto: n.Proto}, proxy.ViaNodePort) {
		svc.NodePort = 0
	}
	svc.SourceRanges = nil
	for _, p := range s.SourceRanges {
		if p.IsValid() && p.Bits() == 0 && c.cfg.ours(p.Addr()) { // everybody
			svc.SourceRanges = nil
			break
		}
		if p.IsValid() && c.cfg.ours(p.Addr()) {
			svc.SourceRanges = append(svc.SourceRanges, p.Masked())
		}
	}
	svc.Endpoints = c.endpoints(n, s.Endpoints)
	c.names = append(c.names, n)
	return svc, true
}

// endpoints drops what is no address of the family, and doubles. It copies
// only if it must.
func (c *checker) endpoints(n proxy.PortName, eps []proxy.Endpoint) []proxy.Endpoint {
	good := func(i int) bool {
		a := eps[i].Addr
		return c.cfg.ours(a.Addr()) && a.Addr().Zone() == "" && a.Port() != 0
	}
	double := func(i int) bool {
		return i > 0 && slices.ContainsFunc(eps[:i], func(e proxy.Endpoint) bool { return e.Addr == eps[i].Addr })
	}
	sorted := slices.IsSortedFunc(eps, func(a, b proxy.Endpoint) int { return a.Addr.Compare(b.Addr) })
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

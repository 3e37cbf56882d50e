package explain

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/trace"
)

// Name puts names to an Answer's addresses, and says of each Case which of the
// Service's endpoints are no candidates, and why. The Snapshot may be newer or
// older than the rules: an endpoint that is in one and not in the other is named
// as such.
func (a *Answer) Name(s *proxy.Snapshot, o proxy.Overlay) {
	if s == nil {
		return
	}
	named := peer(s, nil, a.Packet.Src)
	a.From = named
	for i := range a.Cases {
		c := &a.Cases[i]
		svc := service(s, c.Service, a.Packet.Dst.Addr().Is6())
		for j := range c.Choices {
			c.Choices[j].Endpoint = peer(s, svc, c.Choices[j].Endpoint.Addr)
		}
		if svc != nil {
			c.exclude(s, svc, o)
		}
	}
}

func service(s *proxy.Snapshot, n proxy.PortName, six bool) *proxy.Service {
	for i := range s.Services {
		if s.Services[i].Name == n && s.Services[i].Is6() == six {
			return &s.Services[i]
		}
	}
	return nil
}

func peer(s *proxy.Snapshot, svc *proxy.Service, a netip.AddrPort) trace.Peer {
	p := trace.Peer{Addr: a}
	if pod, ok := s.Pods[a.Addr()]; ok {
		p.Namespace, p.Pod, p.Node, p.Workload = pod.Namespace, pod.Name, pod.Node, pod.Workload
	} else {
		p.Node = s.Nodes[a.Addr()]
	}
	if svc == nil {
		return p
	}
	for i := range svc.Endpoints {
		if e := &svc.Endpoints[i]; e.Addr == a {
			if e.Pod != "" {
				p.Namespace, p.Pod = e.Namespace, e.Pod
			}
			if e.Node != "" {
				p.Node = e.Node
			}
		}
	}
	return p
}

// exclude lists the endpoints that are not among the Choices.
func (c *Case) exclude(s *proxy.Snapshot, svc *proxy.Service, o proxy.Overlay) {
	sel := svc.Select(s.Node, o)
	policy := sel.Policy
	local := c.Policy == proxy.PolicyLocal || c.Via == proxy.ViaClusterIP && svc.InternalLocal ||
		c.Via != proxy.ViaClusterIP && svc.ExternalLocal && len(c.Choices) == 0
	if local {
		policy = sel.LocalPolicy
	}
	if c.Policy == "" || policy == proxy.PolicyTerminating {
		c.Policy = policy
	}
	why := svc.Exclusions(s.Node, o, local)
	for i := range svc.Endpoints {
		e := &svc.Endpoints[i]
		if slices.ContainsFunc(c.Choices, func(x Choice) bool { return x.Endpoint.Addr == e.Addr }) {
			continue
		}
		x := Excluded{Endpoint: peer(s, svc, e.Addr)}
		x.Code, x.Why = exclusion(why[i], e, s.Node)
		switch {
		case why[i] == proxy.OutOfOverlay:
			x.Why += ": " + o.Out[e.Addr].Reason
		case why[i] == proxy.Candidate && c.Algorithm == AlgorithmAffinity:
			x.Code, x.Why = "affinity", "the client is kept with another"
		}
		c.Excluded = append(c.Excluded, x)
	}
	for i := range c.Choices {
		x := &c.Choices[i]
		if !slices.ContainsFunc(svc.Endpoints, func(e proxy.Endpoint) bool { return e.Addr == x.Endpoint.Addr }) {
			c.Excluded = append(c.Excluded, Excluded{Endpoint: x.Endpoint, Code: "endpoint-gone", Why: "the rules have it, the API does not (any more)"})
		}
	}
	if len(svc.Endpoints) == 0 && len(svc.OtherPorts) > 0 {
		c.Excluded = append(c.Excluded, Excluded{Code: "port-mismatch", Why: fmt.Sprintf("the EndpointSlices have endpoints for %s only, none for %s/%s",
			strings.Join(svc.OtherPorts, ", "), svc.Name.Port, strings.ToUpper(svc.Name.Proto.String()))})
	}
}

// exclusion says why an endpoint is no candidate on a node.
func exclusion(why proxy.Exclusion, e *proxy.Endpoint, node proxy.Node) (code, words string) {
	switch why {
	case proxy.NotReady:
		return "not-ready", "not ready"
	case proxy.Terminating:
		return "terminating", "terminating"
	case proxy.OtherZone:
		return "other-zone", fmt.Sprintf("its topology hints are for zone %s, and this node is in %s", strings.Join(e.ZoneHints, ", "), node.Zone)
	case proxy.OtherNode:
		return "other-node", fmt.Sprintf("its topology hints are for node %s, and this is %s", strings.Join(e.NodeHints, ", "), node.Name)
	case proxy.NotLocal:
		if e.Node == "" || e.Node == node.Name { // known from the pod alone, which does not count
			return "not-local", "its EndpointSlice does not say that it is on this node, and the policy is Local"
		}
		return "not-local", fmt.Sprintf("on %s, and the policy is Local", e.Node)
	case proxy.OutOfOverlay:
		return "out", "out for a time"
	case proxy.Candidate:
	}
	return "endpoint-missing", "the API has it as a candidate, the rules do not"
}

// Front says of an address of a Service, as rules have it, which of the Service's
// endpoints are no candidates there, and why.
func Front(s *proxy.Snapshot, live *liverules.Service, f *liverules.Front) []Excluded {
	if s == nil {
		return nil
	}
	svc := service(s, live.Name, live.IP6)
	if svc == nil {
		return nil
	}
	c := Case{Service: live.Name, Via: f.Via}
	if f.Via != proxy.ViaClusterIP && svc.ExternalLocal {
		c.Policy = proxy.PolicyLocal
	}
	for _, x := range f.Choices {
		c.Choices = append(c.Choices, Choice{Endpoint: trace.Peer{Addr: x.Endpoint}})
	}
	c.exclude(s, svc, proxy.Overlay{})
	return c.Excluded
}

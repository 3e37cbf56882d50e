package explain

import (
	"net/netip"
	"slices"

	"github.com/kptrace/kptrace/proxy"
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
	want, policy := sel.Cluster, sel.Policy
	local := c.Policy == proxy.PolicyLocal || c.Via == proxy.ViaClusterIP && svc.InternalLocal ||
		c.Via != proxy.ViaClusterIP && svc.ExternalLocal && len(c.Choices) == 0
	if local {
		want, policy = sel.Local, sel.LocalPolicy
	}
	if c.Policy == "" || policy == proxy.PolicyTerminating {
		c.Policy = policy
	}
	for i := range svc.Endpoints {
		e := &svc.Endpoints[i]
		if slices.ContainsFunc(c.Choices, func(x Choice) bool { return x.Endpoint.Addr == e.Addr }) {
			continue
		}
		why := ""
		_, out := o.Out[e.Addr]
		switch {
		case c.Algorithm == AlgorithmAffinity && slices.ContainsFunc(want, func(w proxy.Endpoint) bool { return w.Addr == e.Addr }):
			why = "the client is kept with another"
		case slices.ContainsFunc(want, func(w proxy.Endpoint) bool { return w.Addr == e.Addr }):
			why = "the API has it as a candidate, the rules do not"
		case out:
			why = "out for a time: " + o.Out[e.Addr].Reason
		case e.Terminating:
			why = "terminating"
		case !e.Ready:
			why = "not ready"
		case local && !e.Local:
			why = "not on this node, and the policy is Local"
		default:
			why = "its topology hints send others to it"
			if len(e.ZoneHints) > 0 {
				why = "for zone " + e.ZoneHints[0] + ", and this node is in " + cmpOr(s.Node.Zone, "no zone")
			}
		}
		c.Excluded = append(c.Excluded, Excluded{Endpoint: peer(s, svc, e.Addr), Why: why})
	}
	for i := range c.Choices {
		x := &c.Choices[i]
		if !slices.ContainsFunc(svc.Endpoints, func(e proxy.Endpoint) bool { return e.Addr == x.Endpoint.Addr }) {
			c.Excluded = append(c.Excluded, Excluded{Endpoint: x.Endpoint, Why: "the rules have it, the API does not (any more)"})
		}
	}
}

func cmpOr(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

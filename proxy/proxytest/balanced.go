package proxytest

import (
	"slices"

	"github.com/kptrace/kptrace/proxy"
)

// Balanced is the table as IPVS keeps it, which decides by the destination alone
// and serves Services at addresses that are the node's own:
//
//   - node ports are not served on localhost;
//   - a port that a Service address does not have is refused, not routed;
//   - an external traffic policy Local holds for pods and the node too: they are
//     not sent to other nodes' endpoints;
//   - what the node sends to a Service address has that address for a source and
//     is always masqueraded.
func Balanced(cases []Case) []Case {
	cases = slices.Clone(cases)
	for i := range cases {
		c := &cases[i]
		c.Rows = slices.Clone(c.Rows)
		for j := range c.Rows {
			c.balance(&c.Rows[j])
		}
	}
	return cases
}

func (c *Case) balance(r *Row) {
	if r.To.Addr().IsLoopback() {
		r.Want = Want{}
		return
	}
	var own *proxy.Service
	for i := range c.Setup.Snapshot.Services {
		s := &c.Setup.Snapshot.Services[i]
		switch {
		case r.Want.Service == s.Name.String() && r.Proto == s.Name.Proto:
			own = s
		case r.Want.Verdict == proxy.Pass && s.ClusterIP == r.To.Addr():
			r.Want = Want{Verdict: proxy.Reject, Reason: "no-such-port"}
			return
		}
	}
	if own == nil {
		return
	}
	if r.From == FromNode && r.Want.Via == proxy.ViaClusterIP && r.Want.Verdict == proxy.Forward && r.Want.Masquerade == "" {
		r.Want.Masquerade = "node"
	}
	if !own.ExternalLocal || r.Want.Via == proxy.ViaClusterIP || r.Want.Policy == proxy.PolicyLocal || r.Want.Verdict != proxy.Forward {
		return
	}
	sel := own.Select(c.Setup.Snapshot.Node, c.Setup.Overlay)
	r.Want.Policy, r.Want.Excluded, r.Want.Endpoints = sel.LocalPolicy, sel.LocalExcluded, nil
	for _, ep := range sel.Local {
		r.Want.Endpoints = append(r.Want.Endpoints, ep.Addr)
	}
	if r.Want.Via == proxy.ViaNodePort {
		r.Want.Masquerade = ""
	}
	if len(sel.Local) == 0 {
		r.Want.Verdict, r.Want.Reason, r.Want.Masquerade = proxy.Drop, "no-local-endpoints", ""
	}
}

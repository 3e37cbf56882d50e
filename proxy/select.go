package proxy

import "slices"

// The words of Select.Policy and Outcome.Policy.
const (
	PolicyCluster     = "Cluster"
	PolicyLocal       = "Local"
	PolicyTerminating = "terminating"
)

// Select says which endpoints serve the Service's traffic on node while o is
// out. It decides as kube-proxy 1.36 does (KEP-1669, KEP-2433, KEP-3015):
//
//   - Cluster holds the ready endpoints whose topology hints admit the node;
//     where none is ready, those that terminate and still serve.
//   - Local holds the ready endpoints on the node; where there are none, those
//     on the node that terminate and still serve.
//
// Hints count only if every ready endpoint has them and one of them names the
// node, or else the zone. An Overlay takes endpoints out of both sets before
// hints are looked at, but never the last one: where it would leave nothing of
// a set, that set is chosen as if it were empty.
func (s *Service) Select(node Node, o Overlay) Select {
	var sel Select
	var why []reason
	sel.Cluster, sel.Policy, why = choose(s.Endpoints, o, PolicyCluster,
		func(*Endpoint) bool { return true },
		func(ready []*Endpoint) func(*Endpoint) bool { return admits(ready, node) })
	sel.Excluded = count(why)
	sel.Local, sel.LocalPolicy, why = choose(s.Endpoints, o, PolicyLocal,
		func(ep *Endpoint) bool { return ep.Local },
		func([]*Endpoint) func(*Endpoint) bool { return nil })
	sel.LocalExcluded = count(why)
	return sel
}

// UsesCluster reports whether any of the Service's addresses leads to
// Select.Cluster. Addresses for outside clients always do: a pod that dials
// one is sent as if it had left the cluster and come back.
func (s *Service) UsesCluster() bool { return !s.InternalLocal || s.ExternallyReachable() }

// UsesLocal reports whether any of the Service's addresses leads to
// Select.Local.
func (s *Service) UsesLocal() bool {
	return s.InternalLocal || s.ExternalLocal && s.ExternallyReachable()
}

// reason is why an endpoint is out.
type reason uint8

const (
	in reason = iota
	notReady
	terminating
	otherZone
	notLocal
	overlay
)

// choose picks the endpoints of one policy among those in scope. topology says
// which of the ready ones the node may use; it returns nil for all. why has
// one reason for each of eps.
func choose(eps []Endpoint, o Overlay, policy string, scope func(*Endpoint) bool,
	topology func(ready []*Endpoint) func(*Endpoint) bool) (chosen []Endpoint, word string, why []reason) {
	why = make([]reason, len(eps))
	var ready, serving, kept []*Endpoint
	for i := range eps {
		ep := &eps[i]
		_, out := o.Out[ep.Addr]
		switch {
		case !scope(ep):
		case ep.Ready:
			ready = append(ready, ep)
			if !out {
				kept = append(kept, ep)
			}
		case ep.Serving && ep.Terminating:
			serving = append(serving, ep)
		}
	}
	word = policy
	fallback := len(ready) == 0 && len(serving) > 0
	if fallback {
		word = PolicyTerminating
		for _, ep := range serving {
			if _, out := o.Out[ep.Addr]; !out {
				kept = append(kept, ep)
			}
		}
	}
	obeyed := len(kept) > 0
	if !obeyed {
		kept = ready
	}
	var admitted func(*Endpoint) bool
	if !fallback {
		admitted = topology(kept)
	}
	for i := range eps {
		ep := &eps[i]
		_, out := o.Out[ep.Addr]
		usable := ep.Ready
		if fallback {
			usable = ep.Serving && ep.Terminating
		}
		switch {
		case !scope(ep):
			why[i] = notLocal
		case !usable && ep.Terminating:
			why[i] = terminating
		case !usable:
			why[i] = notReady
		case out && obeyed:
			why[i] = overlay
		case admitted != nil && !admitted(ep):
			why[i] = otherZone
		}
	}
	return those(eps, why), word, why
}

// those returns the endpoints that nothing keeps out: eps itself where that is
// all of them, which is the usual case, and much memory in large clusters.
func those(eps []Endpoint, why []reason) []Endpoint {
	n := 0
	for _, r := range why {
		if r == in {
			n++
		}
	}
	switch n {
	case 0:
		return nil
	case len(eps):
		return eps[:n:n]
	}
	chosen := make([]Endpoint, 0, n)
	for i := range eps {
		if why[i] == in {
			chosen = append(chosen, eps[i])
		}
	}
	return chosen
}

// admits returns which of the ready endpoints the node may use by their
// topology hints, nil for all.
func admits(ready []*Endpoint, node Node) func(*Endpoint) bool {
	prefer := func(hints func(*Endpoint) []string, name string) func(*Endpoint) bool {
		if name == "" {
			return nil
		}
		named := false
		for _, ep := range ready {
			if len(hints(ep)) == 0 {
				return nil
			}
			named = named || slices.Contains(hints(ep), name)
		}
		if !named {
			return nil
		}
		return func(ep *Endpoint) bool { return slices.Contains(hints(ep), name) }
	}
	if f := prefer(func(ep *Endpoint) []string { return ep.NodeHints }, node.Name); f != nil {
		return f
	}
	return prefer(func(ep *Endpoint) []string { return ep.ZoneHints }, node.Zone)
}

func count(why []reason) Excluded {
	var e Excluded
	for _, r := range why {
		switch r {
		case notReady:
			e.NotReady++
		case terminating:
			e.Terminating++
		case otherZone:
			e.OtherZone++
		case notLocal:
			e.NotLocal++
		case overlay:
			e.Overlay++
		}
	}
	return e
}

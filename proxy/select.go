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
	var why []Exclusion
	sel.Cluster, sel.Policy, why = s.cluster(node, o)
	sel.Excluded = count(why)
	sel.Local, sel.LocalPolicy, why = s.local(o)
	sel.LocalExcluded = count(why)
	return sel
}

// Exclusions says of each of the Service's endpoints why it is not in
// Select.Cluster or, with local, not in Select.Local.
func (s *Service) Exclusions(node Node, o Overlay, local bool) []Exclusion {
	if local {
		_, _, why := s.local(o)
		return why
	}
	_, _, why := s.cluster(node, o)
	return why
}

func (s *Service) cluster(node Node, o Overlay) (chosen []Endpoint, word string, why []Exclusion) {
	return choose(s.Endpoints, o, PolicyCluster,
		func(*Endpoint) bool { return true },
		func(ready []*Endpoint) (func(*Endpoint) bool, Exclusion) { return admits(ready, node) })
}

func (s *Service) local(o Overlay) (chosen []Endpoint, word string, why []Exclusion) {
	return choose(s.Endpoints, o, PolicyLocal,
		func(ep *Endpoint) bool { return ep.Local },
		func([]*Endpoint) (func(*Endpoint) bool, Exclusion) { return nil, Candidate })
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

// Exclusion is why an endpoint is no candidate.
type Exclusion uint8

// The reasons; Candidate is for those that are one.
const (
	Candidate Exclusion = iota
	NotReady
	Terminating
	OtherZone    // by its topology hints
	OtherNode    // by its topology hints
	NotLocal     // and the policy is Local
	OutOfOverlay // taken out for a time
)

// choose picks the endpoints of one policy among those in scope. topology says
// which of the ready ones the node may use; it returns nil for all. why has
// one reason for each of eps.
func choose(eps []Endpoint, o Overlay, policy string, scope func(*Endpoint) bool,
	topology func(ready []*Endpoint) (func(*Endpoint) bool, Exclusion)) (chosen []Endpoint, word string, why []Exclusion) {
	why = make([]Exclusion, len(eps))
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
	var hinted Exclusion
	if !fallback {
		admitted, hinted = topology(kept)
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
			why[i] = NotLocal
		case !usable && ep.Terminating:
			why[i] = Terminating
		case !usable:
			why[i] = NotReady
		case out && obeyed:
			why[i] = OutOfOverlay
		case admitted != nil && !admitted(ep):
			why[i] = hinted
		}
	}
	return those(eps, why), word, why
}

// those returns the endpoints that nothing keeps out: eps itself where that is
// all of them, which is the usual case, and much memory in large clusters.
func those(eps []Endpoint, why []Exclusion) []Endpoint {
	n := 0
	for _, r := range why {
		if r == Candidate {
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
		if why[i] == Candidate {
			chosen = append(chosen, eps[i])
		}
	}
	return chosen
}

// admits returns which of the ready endpoints the node may use by their
// topology hints, nil for all, and why not the others.
func admits(ready []*Endpoint, node Node) (func(*Endpoint) bool, Exclusion) {
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
		return f, OtherNode
	}
	return prefer(func(ep *Endpoint) []string { return ep.ZoneHints }, node.Zone), OtherZone
}

func count(why []Exclusion) Excluded {
	var e Excluded
	for _, r := range why {
		switch r {
		case Candidate:
		case NotReady:
			e.NotReady++
		case Terminating:
			e.Terminating++
		case OtherZone, OtherNode:
			e.OtherZone++
		case NotLocal:
			e.NotLocal++
		case OutOfOverlay:
			e.Overlay++
		}
	}
	return e
}

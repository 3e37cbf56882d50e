package trace

import (
	"net/netip"
	"slices"
	"time"
)

// Filter selects Flows. What stands in one field is joined by "or", the fields
// by "and"; an empty field selects everything, and so does the zero Filter.
type Filter struct {
	// Resources are what the Flow must concern: a Service dialled, a pod at
	// either end, a node at either end or observing, a workload at either end,
	// or the namespace of the Service.
	Resources []Selector
	// Namespace is the namespace of the Service.
	Namespace string
	// From selects by the client, To by the endpoint (also one tried in vain)
	// or by what the client dialled.
	From, To []Selector
	// Ports selects by the Service port, its name or the number dialled.
	Ports    []Port
	Outcomes []Outcome
	// MinDuration selects Flows whose Duration is known and at least this.
	MinDuration time.Duration
}

// Match reports whether the filter selects f.
func (x *Filter) Match(f *Flow) bool {
	switch {
	case x.Namespace != "" && f.Service.Name.Namespace != x.Namespace:
		return false
	case len(x.Outcomes) > 0 && !slices.Contains(x.Outcomes, f.Outcome):
		return false
	case x.MinDuration > 0 && f.Duration < x.MinDuration:
		return false
	case !anyOf(x.Resources, func(s *Selector) bool { return s.concerns(f) }):
		return false
	case !anyOf(x.From, func(s *Selector) bool { return s.matchPeer(&f.Client) }):
		return false
	case !anyOf(x.To, func(s *Selector) bool { return s.matchTarget(f) }):
		return false
	}
	return anyOf(x.Ports, func(p *Port) bool { return p.match(&f.Service) })
}

// Names reports whether the filter names Services, by themselves or by their
// namespace, and MatchService then says which.
func (x *Filter) Names() bool {
	return x.Namespace != "" || slices.ContainsFunc(slices.Concat(x.Resources, x.To), func(s Selector) bool {
		return s.Kind == SelectService || s.Kind == SelectNamespace
	})
}

// MatchService reports whether the filter names the Service that ref is a way
// to. It is false for a filter that names no Services.
func (x *Filter) MatchService(ref ServiceRef) bool {
	if !x.Names() || x.Namespace != "" && ref.Name.Namespace != x.Namespace {
		return false
	}
	named := func(list []Selector) bool {
		return anyOf(list, func(s *Selector) bool {
			switch s.Kind {
			case SelectService:
				return s.matchService(&ref)
			case SelectNamespace:
				return matchName(s.Name, ref.Name.Namespace)
			}
			return false
		})
	}
	return named(x.Resources) && named(x.To) && anyOf(x.Ports, func(p *Port) bool { return p.match(&ref) })
}

// Settled returns the filter without the fields by which a Flow can change its
// mind: the outcome and the duration. What the Settled filter selects it
// selects in every revision.
func (x Filter) Settled() Filter {
	x.Outcomes, x.MinDuration = nil, 0
	return x
}

// anyOf reports whether a test holds for one of list, or list is empty.
func anyOf[T any](list []T, test func(*T) bool) bool {
	for i := range list {
		if test(&list[i]) {
			return true
		}
	}
	return len(list) == 0
}

// SelectorKind is the kind of thing a Selector names, as it stands before the
// slash.
type SelectorKind string

// The kinds. Workload stands for any owner of pods: deploy/x, sts/x, ds/x,
// rs/x, job/x and cronjob/x, whose kind is in Selector.Owner.
const (
	SelectService   SelectorKind = "svc"
	SelectPod       SelectorKind = "pod"
	SelectNode      SelectorKind = "node"
	SelectNamespace SelectorKind = "ns"
	SelectWorkload  SelectorKind = "workload"
	SelectAddress   SelectorKind = "ip"
)

// Selector names one thing, or several by a "*" in the name.
type Selector struct {
	Kind SelectorKind
	// Namespace is that of a Service, pod or workload; empty means any.
	Namespace, Name string
	// Owner is the API's word for the kind of workload: "Deployment".
	Owner string
	// Port narrows a Service to a port name or number, an address to a port.
	Port Port
	// Prefix is the address or range of a SelectAddress.
	Prefix netip.Prefix
}

// String returns the selector as it would be typed, without the namespace.
func (s Selector) String() string {
	text := ""
	switch s.Kind {
	case SelectAddress:
		text = s.Prefix.String()
		if s.Prefix.IsSingleIP() {
			text = s.Prefix.Addr().String()
			if s.Port != (Port{}) {
				return netip.AddrPortFrom(s.Prefix.Addr(), s.Port.Number).String()
			}
		}
	case SelectWorkload:
		text = workloadPrefix(s.Owner) + "/" + s.Name
	default:
		text = string(s.Kind) + "/" + s.Name
	}
	if s.Port != (Port{}) {
		text += ":" + s.Port.String()
	}
	return text
}

// concerns is Match for Filter.Resources.
func (s *Selector) concerns(f *Flow) bool {
	switch s.Kind {
	case SelectService:
		return s.matchService(&f.Service)
	case SelectNamespace:
		return matchName(s.Name, f.Service.Name.Namespace)
	case SelectNode:
		if matchName(s.Name, f.Node) {
			return true
		}
	}
	return s.matchPeer(&f.Client) || s.matchTarget(f)
}

// matchTarget is Match for Filter.To.
func (s *Selector) matchTarget(f *Flow) bool {
	if s.Kind == SelectService {
		return s.matchService(&f.Service)
	}
	if s.Kind == SelectAddress && s.matchAddr(f.Service.Addr) {
		return true
	}
	return s.matchPeer(&f.Backend) || slices.ContainsFunc(f.Attempts, func(a Attempt) bool {
		return s.matchPeer(&a.Endpoint)
	})
}

func (s *Selector) matchService(ref *ServiceRef) bool {
	return matchName(s.Name, ref.Name.Name) &&
		(s.Namespace == "" || s.Namespace == ref.Name.Namespace) &&
		(s.Port == Port{} || s.Port.match(ref))
}

func (s *Selector) matchPeer(p *Peer) bool {
	switch s.Kind {
	case SelectPod:
		return p.Pod != "" && matchName(s.Name, p.Pod) && (s.Namespace == "" || s.Namespace == p.Namespace)
	case SelectNode:
		return p.Node != "" && matchName(s.Name, p.Node)
	case SelectNamespace:
		return p.Namespace != "" && matchName(s.Name, p.Namespace)
	case SelectWorkload:
		return matchWorkload(s, p.Workload) && (s.Namespace == "" || s.Namespace == p.Namespace)
	case SelectAddress:
		return s.matchAddr(p.Addr)
	}
	return false
}

func (s *Selector) matchAddr(a netip.AddrPort) bool {
	return s.Prefix.Contains(a.Addr()) && (s.Port.Number == 0 || s.Port.Number == a.Port())
}

// Port is a Service port by number or, if Number is zero, by name.
type Port struct {
	Number uint16
	Name   string
}

func (p *Port) match(ref *ServiceRef) bool {
	if p.Number != 0 {
		return ref.Addr.Port() == p.Number
	}
	return ref.Name.Port == p.Name
}

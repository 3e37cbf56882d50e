package apiserver

import (
	"cmp"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/kube"
)

// snapshot returns a Snapshot of what is known, nil if it is that of the last
// one. What did not change is shared with it.
func (s *state) snapshot() *proxy.Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.renamed {
		s.naming = true
		for _, p := range s.parts {
			if p.Looked {
				s.dirty[p.Namespace+"/"+p.Name] = true
			}
		}
	}
	changed := s.convert()
	if s.last != nil && !changed && !s.renamed && !s.other {
		return nil
	}
	snap := &proxy.Snapshot{Node: proxy.Node{Name: s.node}}
	if s.own != nil {
		snap.Node = s.own.node
		snap.Problems = slices.Clone(s.own.problems)
	} else {
		snap.Problems = []proxy.Problem{{Object: "Node " + s.node, Message: "no such Node, or it cannot be read: its zone, addresses and pod ranges are unknown; if the Node has another name, give it by --node"}}
	}
	snap.ServiceCIDRs = s.serviceCIDRs()
	kube.Assemble(snap, s.parts)
	if s.last != nil && !s.naming {
		snap.Pods = s.last.Pods
	} else {
		snap.Pods = s.podNames()
	}
	if s.last != nil && !s.other && !s.renamed {
		snap.Nodes = s.last.Nodes
	} else {
		snap.Nodes = s.nodeNames()
	}
	s.other, s.renamed, s.naming = false, false, false
	s.last = snap
	return snap
}

// convert brings parts up to date and reports whether one is different.
func (s *state) convert() bool {
	changed := false
	for key := range s.dirty {
		namespace, name, _ := strings.Cut(key, "/")
		at, found := slices.BinarySearchFunc(s.parts, key, func(p *kube.Part, _ string) int {
			return cmp.Or(strings.Compare(p.Namespace, namespace), strings.Compare(p.Name, name))
		})
		svc := s.services[key]
		if svc == nil {
			if found {
				s.naming = s.naming || s.names(s.parts[at])
				s.parts = slices.Delete(s.parts, at, at+1)
				changed = true
			}
			continue
		}
		part := kube.ConvertService(svc, slices.Collect(maps.Values(s.byOwner[key])), s.node, s.pods.names)
		switch {
		case !found:
			s.naming = s.naming || s.names(part)
			s.parts = slices.Insert(s.parts, at, part)
			changed = true
		case same(s.parts[at], part):
			// A time alone is shown with the next change.
			p := *s.parts[at]
			p.Triggers = part.Triggers
			s.parts[at] = &p
		default:
			s.naming = s.naming || !sameNames(s.parts[at], part) && (s.names(s.parts[at]) || s.names(part))
			s.parts[at] = part
			changed = true
		}
	}
	clear(s.dirty)
	return changed
}

// same reports whether two Parts differ in nothing but the times of changes.
func same(a, b *kube.Part) bool {
	x, y := *a, *b
	x.Triggers, y.Triggers = nil, nil
	return reflect.DeepEqual(x, y)
}

// names reports whether a Part names an address that no pod is known to have.
func (s *state) names(p *kube.Part) bool {
	for i := range p.Services {
		for j := range p.Services[i].Endpoints {
			ep := &p.Services[i].Endpoints[j]
			if _, known := s.pods.names[ep.Addr.Addr()]; !known && ep.Pod != "" {
				return true
			}
		}
	}
	return false
}

// sameNames reports whether two Parts name the same endpoints in the same way.
func sameNames(a, b *kube.Part) bool {
	return slices.EqualFunc(a.Services, b.Services, func(a, b proxy.Service) bool {
		return slices.EqualFunc(a.Endpoints, b.Endpoints, func(a, b proxy.Endpoint) bool {
			return a.Addr == b.Addr && a.Pod == b.Pod && a.Namespace == b.Namespace && a.Node == b.Node
		})
	})
}

func (s *state) podNames() map[netip.Addr]proxy.Pod {
	size := len(s.pods.names)
	if s.last != nil {
		size = max(size, len(s.last.Pods))
	}
	names := make(map[netip.Addr]proxy.Pod, size)
	maps.Copy(names, s.pods.names)
	kube.Names(names, s.parts)
	return names
}

func (s *state) nodeNames() map[netip.Addr]string {
	names := make(map[netip.Addr]string, len(s.nodes)+1)
	for _, r := range s.nodes {
		for _, ip := range r.node.Addrs {
			if other, ok := names[ip]; !ok || r.name < other {
				names[ip] = r.name
			}
		}
	}
	if s.own != nil {
		for _, ip := range s.own.node.Addrs {
			names[ip] = s.own.name
		}
	}
	return names
}

func (s *state) serviceCIDRs() []netip.Prefix {
	var all []netip.Prefix
	for _, r := range s.ranges {
		for _, text := range r.Spec.CIDRs {
			// The API server takes no other text than a range.
			if p, err := netip.ParsePrefix(text); err == nil && !slices.Contains(all, p) {
				all = append(all, p)
			}
		}
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	return all
}

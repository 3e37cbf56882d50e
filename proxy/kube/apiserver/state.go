package apiserver

import (
	"reflect"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/kube"
)

// state is what is known of the cluster, and what of it the last Snapshot does
// not show yet.
type state struct {
	node string // our own

	mu       sync.Mutex
	services map[string]*corev1.Service
	slices   map[string]*discoveryv1.EndpointSlice
	byOwner  map[string]map[string]*discoveryv1.EndpointSlice // by Service, by slice
	own      *nodeRecord
	nodes    map[string]*nodeRecord
	pods     podNames
	ranges   map[string]*networkingv1.ServiceCIDR

	parts []*kube.Part // by namespace and name
	dirty map[string]bool
	// other is set by changes of what is not a Service; renamed by those of
	// Pods and other Nodes, which only names depend on.
	other, renamed bool
	last           *proxy.Snapshot
	// naming says that the last Snapshot's Pods are no longer right.
	naming bool

	changed chan struct{} // something to program, or a table is synced
	named   chan struct{} // something to show
}

func newState(node string) *state {
	return &state{
		node:     node,
		services: map[string]*corev1.Service{},
		slices:   map[string]*discoveryv1.EndpointSlice{},
		byOwner:  map[string]map[string]*discoveryv1.EndpointSlice{},
		nodes:    map[string]*nodeRecord{},
		pods:     newPodNames(),
		ranges:   map[string]*networkingv1.ServiceCIDR{},
		dirty:    map[string]bool{},
		changed:  make(chan struct{}, 1),
		named:    make(chan struct{}, 1),
	}
}

func (s *state) wake() { signal(s.changed) }

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (s *state) setService(key string, obj any) {
	s.services[key] = obj.(*corev1.Service)
	s.touch(key)
}

func (s *state) removeService(key string) {
	delete(s.services, key)
	s.touch(key)
}

func (s *state) touch(service string) {
	s.dirty[service] = true
	s.wake()
}

func (s *state) setSlice(key string, obj any) {
	slice := obj.(*discoveryv1.EndpointSlice)
	owner := kube.ServiceOf(slice)
	if old := s.slices[key]; old != nil && kube.ServiceOf(old) != owner {
		s.removeSlice(key)
	}
	s.slices[key] = slice
	if owner == "" {
		return // a slice may belong to no Service
	}
	if s.byOwner[owner] == nil {
		s.byOwner[owner] = map[string]*discoveryv1.EndpointSlice{}
	}
	s.byOwner[owner][key] = slice
	s.touch(owner)
}

func (s *state) removeSlice(key string) {
	owner := kube.ServiceOf(s.slices[key])
	delete(s.slices, key)
	if owner == "" {
		return
	}
	delete(s.byOwner[owner], key)
	if len(s.byOwner[owner]) == 0 {
		delete(s.byOwner, owner)
	}
	s.touch(owner)
}

func (s *state) setOwn(_ string, obj any) {
	r := obj.(*nodeRecord)
	if r.name != s.node {
		return // a server that ignores selectors
	}
	if s.own == nil || !reflect.DeepEqual(s.own.node, r.node) || !slices.Equal(s.own.problems, r.problems) {
		s.other = true
		s.wake()
	}
	s.own = r
}

func (s *state) removeOwn(key string) {
	if s.own != nil && key == "/"+s.own.name {
		s.own, s.other = nil, true
		s.wake()
	}
}

func (s *state) setNode(key string, obj any) {
	r := obj.(*nodeRecord)
	old := s.nodes[key]
	s.nodes[key] = r
	if old == nil || !slices.Equal(old.node.Addrs, r.node.Addrs) {
		s.rename()
	}
}

func (s *state) removeNode(key string) {
	delete(s.nodes, key)
	s.rename()
}

func (s *state) setPod(key string, obj any) {
	if s.pods.set(key, obj.(*podRecord)) {
		s.rename()
	}
}

func (s *state) removePod(key string) {
	if s.pods.set(key, nil) {
		s.rename()
	}
}

func (s *state) rename() {
	s.renamed = true
	signal(s.named)
}

func (s *state) setRange(key string, obj any) {
	r := obj.(*networkingv1.ServiceCIDR)
	if old := s.ranges[key]; old == nil || !slices.Equal(old.Spec.CIDRs, r.Spec.CIDRs) {
		s.other = true
		s.wake()
	}
	s.ranges[key] = r
}

func (s *state) removeRange(key string) {
	delete(s.ranges, key)
	s.other = true
	s.wake()
}

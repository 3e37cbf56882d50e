package kube

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// Part is what one Service adds to a Snapshot. It is immutable: whoever follows
// a cluster keeps the Parts of Services that did not change.
type Part struct {
	Namespace, Name string
	// Created and File, as far as they are known, settle who keeps what two
	// Services claim.
	Created time.Time
	File    string
	// Services are its ports, ordered as in a Snapshot.
	Services []proxy.Service
	// Skipped is set if the Service is not proxied on purpose.
	Skipped *proxy.Skipped
	// Problems are faults of the Service and of its slices.
	Problems []proxy.Problem
	// Looked says that an endpoint did not say which pod or node it is, so
	// that the Part depends on what is known of pods.
	Looked bool
	// Triggers are those of the Service's slices, nil if none says when.
	Triggers map[string]proxy.Trigger
}

// ConvertService makes the Part of one Service and its slices, as seen by the
// named node. The pods, by address, name endpoints that do not name themselves.
// The same objects give the same Part, in whatever order the slices come.
func ConvertService(svc *corev1.Service, endpoints []*discoveryv1.EndpointSlice, node string, pods map[netip.Addr]proxy.Pod) *Part {
	p := &part{Part: Part{Namespace: svc.Namespace, Name: svc.Name, Created: svc.CreationTimestamp.Time}, node: node, pods: pods}
	if reason := skip(svc); reason != "" {
		p.Skipped = &proxy.Skipped{Namespace: svc.Namespace, Name: svc.Name, Reason: reason}
		return &p.Part
	}
	p.service(svc)
	endpoints = slices.Clone(endpoints)
	slices.SortFunc(endpoints, func(a, b *discoveryv1.EndpointSlice) int { return strings.Compare(a.Name, b.Name) })
	for _, slice := range endpoints {
		p.checkSlice(slice)
		p.trigger(slice)
	}
	for i := range p.Services {
		p.endpoints(&p.Services[i], endpoints)
	}
	p.weigh(svc)
	slices.SortFunc(p.Services, func(a, b proxy.Service) int {
		if n := a.Name.Compare(b.Name); n != 0 {
			return n
		}
		return a.ClusterIP.Compare(b.ClusterIP)
	})
	return &p.Part
}

// Assemble puts parts into snap: its Services, Skipped and Problems, each in
// its order, and into its Pods the names that endpoints give themselves. Two
// Services that claim the same address or node port are a Problem; the older
// keeps it, so that a new one takes nothing from one that works.
func Assemble(snap *proxy.Snapshot, parts []*Part) {
	byName := func(a, b *Part) int {
		if n := strings.Compare(a.Namespace, b.Namespace); n != 0 {
			return n
		}
		return strings.Compare(a.Name, b.Name)
	}
	if !slices.IsSortedFunc(parts, byName) {
		parts = slices.Clone(parts)
		slices.SortFunc(parts, byName)
	}
	count := 0
	for _, p := range parts {
		count += len(p.Services)
	}
	snap.Services = slices.Grow(snap.Services, count)
	snap.Triggers = make(map[string]proxy.Trigger, len(parts))
	claimed := make(claims, 2*count)
	if !claimed.take(parts) {
		clear(claimed)
		claimed.take(byAge(parts))
	}
	for _, p := range parts {
		if p.Skipped != nil {
			snap.Skipped = append(snap.Skipped, *p.Skipped)
		}
		snap.Problems = append(snap.Problems, p.Problems...)
		maps.Copy(snap.Triggers, p.Triggers)
		for i := range p.Services {
			snap.Services = claimed.add(snap, p.Services[i])
		}
	}
	slices.SortFunc(snap.Problems, func(a, b proxy.Problem) int { return strings.Compare(a.Error(), b.Error()) })
}

// Names adds the pods that endpoints name to those known otherwise: names from
// slices serve clients too, since an endpoint may call others.
func Names(pods map[netip.Addr]proxy.Pod, parts []*Part) {
	for _, p := range parts {
		for i := range p.Services {
			for j := range p.Services[i].Endpoints {
				ep := &p.Services[i].Endpoints[j]
				if ep.Pod == "" {
					continue
				}
				if _, ok := pods[ep.Addr.Addr()]; !ok {
					pods[ep.Addr.Addr()] = proxy.Pod{Namespace: ep.Namespace, Name: ep.Pod, Node: ep.Node}
				}
			}
		}
	}
}

// claim is an address or, with an unspecified one, a node port.
type claim struct {
	ip    netip.Addr
	port  uint16
	proto conntrack.Proto
}

// claims says which Service has what.
type claims map[claim]proxy.PortName

// byAge orders parts by who came first, as far as that is known: by creation
// in a cluster; by file in a folder, where one that is added is the last more
// often than not; then by name.
func byAge(parts []*Part) []*Part {
	parts = slices.Clone(parts)
	slices.SortStableFunc(parts, func(a, b *Part) int {
		if a.Created.IsZero() != b.Created.IsZero() {
			if a.Created.IsZero() {
				return 1
			}
			return -1
		}
		return cmp.Or(a.Created.Compare(b.Created), strings.Compare(a.File, b.File))
	})
	return parts
}

// claimsOf returns what s claims; the second is zero without a node port.
func claimsOf(s *proxy.Service) (address, nodePort claim) {
	address = claim{s.ClusterIP, s.Port, s.Name.Proto}
	if s.NodePort != 0 {
		nodePort = claim{netip.IPv4Unspecified(), s.NodePort, s.Name.Proto}
		if s.Is6() {
			nodePort.ip = netip.IPv6Unspecified()
		}
	}
	return address, nodePort
}

// take gives each claim to the first of parts that has it, and reports whether
// nobody else wants it. A Service without an address of its own keeps no node
// port from others.
func (c claims) take(parts []*Part) bool {
	alone := true
	for _, p := range parts {
		for i := range p.Services {
			s := &p.Services[i]
			address, nodePort := claimsOf(s)
			if _, taken := c[address]; taken {
				alone = false
				continue
			}
			c[address] = s.Name
			if nodePort == (claim{}) {
				continue
			}
			if _, taken := c[nodePort]; taken {
				alone = false
				continue
			}
			c[nodePort] = s.Name
		}
	}
	return alone
}

// add returns snap's Services with s, less what belongs to others.
func (c claims) add(snap *proxy.Snapshot, s proxy.Service) []proxy.Service {
	problem := func(field, format string, args ...any) {
		snap.Problems = append(snap.Problems, proxy.Problem{
			Object: objectName("Service", s.Name.Namespace, s.Name.Name), Field: field, Message: fmt.Sprintf(format, args...),
		})
	}
	k, n := claimsOf(&s)
	if other := c[k]; other != s.Name {
		problem("spec.clusterIP", "%s port %d/%s already belongs to %s; this port is left out", k.ip, k.port, k.proto, other)
		return snap.Services
	}
	if n != (claim{}) && c[n] != s.Name {
		problem("spec.ports[].nodePort", "%d/%s already belongs to %s; the node port of this Service is left out", n.port, n.proto, c[n])
		s.NodePort = 0
	}
	return append(snap.Services, s)
}

// objectName is how a Problem names an object.
func objectName(kind, namespace, name string) string {
	if namespace == "" {
		return kind + " " + name
	}
	return kind + " " + namespace + "/" + name
}

package proxy

import (
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Snapshot is everything a node's proxy needs to know, complete and immutable:
// whoever gets one may keep it, and nobody may change it.
type Snapshot struct {
	// Node is the node the proxy runs on.
	Node Node
	// Services is ordered by name, IPv4 before IPv6.
	Services []Service
	// Pods names the pods behind addresses, where known, and Nodes the nodes.
	Pods  map[netip.Addr]Pod
	Nodes map[netip.Addr]string
	// ServiceCIDRs are the ranges that Service addresses come from, empty if
	// unknown.
	ServiceCIDRs []netip.Prefix
	// Skipped lists Services that exist and are not proxied on purpose.
	Skipped []Skipped
	// Problems lists objects that could not be used, wholly or in part.
	Problems []Problem
	// Triggers says when what led to an EndpointSlice's present state
	// happened, by "namespace/name" of the slice. It serves to measure only.
	Triggers map[string]Trigger
}

// Trigger is the time of the change behind a slice, as its annotation
// endpoints.kubernetes.io/last-change-trigger-time gives it.
type Trigger struct {
	At  time.Time
	IP6 bool // the slice holds IPv6 addresses
}

// Node is a Kubernetes node as far as proxying needs it.
type Node struct {
	Name, Zone string
	Addrs      []netip.Addr
	// PodCIDRs are the ranges of the pods on this node.
	PodCIDRs []netip.Prefix
	// Leaving is why the node should get no more traffic from load balancers,
	// empty as long as it should: it is deleted, or drained for that.
	Leaving string
}

// Pod names what is behind a pod address.
type Pod struct {
	Namespace, Name, Node string
	// Workload is the owner as "Deployment/foo", empty if unknown.
	Workload string
}

// Skipped is a Service that has no decisions to show, and why.
type Skipped struct {
	Namespace, Name string
	// Reason is "headless", "ExternalName" or "service-proxy-name".
	Reason string
}

// Problem is a fault in one object. One bad object never stops the others.
type Problem struct {
	// File is the manifest, empty for objects that came from an API server.
	File string
	// Object is "Service shop/foo", Field a path such as
	// "spec.ports[0].nodePort", either empty if unknown.
	Object, Field string
	// Message says what is wrong and what to do.
	Message string
}

// Error returns the problem in one line: file: object: field: message.
func (p Problem) Error() string {
	s := ""
	for _, part := range []string{p.File, p.Object, p.Field} {
		if part != "" {
			s += part + ": "
		}
	}
	return s + p.Message
}

// Service finds a Service port by name, the IPv4 one first.
func (s *Snapshot) Service(n PortName) (*Service, bool) {
	for i := range s.Services {
		if s.Services[i].Name == n {
			return &s.Services[i], true
		}
	}
	return nil, false
}

// PodAddrs returns the addresses of a pod, IPv4 before IPv6, none where it is not
// known.
func (s *Snapshot) PodAddrs(namespace, name string) []netip.Addr {
	var out []netip.Addr
	for a, p := range s.Pods {
		if p.Namespace == namespace && p.Name == name {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// Overlay is what is out for a time, and why. It is separate from the Snapshot
// so that no sync undoes it. A nil or zero Overlay changes nothing.
type Overlay struct {
	// Out lists endpoints that get no new connections.
	Out map[netip.AddrPort]Outage
}

// Outage is why an endpoint is out and until when.
type Outage struct {
	Reason string
	Until  time.Time
}

// Mode is a way of programming the kernel.
type Mode string

// The modes.
const (
	Userspace Mode = "userspace"
	IPTables  Mode = "iptables"
	IPVS      Mode = "ipvs"
	// NFTables is a mode of other kube-proxies, which kptrace can watch.
	NFTables Mode = "nftables"
)

// ParseMode reads a mode's name.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case Userspace, IPTables, IPVS:
		return m, nil
	}
	return "", fmt.Errorf("proxy: unknown mode %q: use iptables, ipvs or userspace", s)
}

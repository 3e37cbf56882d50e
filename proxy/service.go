package proxy

import (
	"net/netip"
	"strings"
	"time"

	"github.com/kptrace/kptrace/conntrack"
)

// PortName names one port of one Service. It is comparable and is the key of
// everything that is per Service port.
type PortName struct {
	Namespace, Name string
	// Port is the port's name in the Service, empty where it has none.
	Port  string
	Proto conntrack.Proto
}

// String returns "namespace/name:port", or "namespace/name" for an unnamed
// port: the key from which kube-proxy's chain names are made.
func (n PortName) String() string {
	if n.Port == "" {
		return n.Namespace + "/" + n.Name
	}
	return n.Namespace + "/" + n.Name + ":" + n.Port
}

// Compare orders names by namespace, name, port and protocol.
func (n PortName) Compare(m PortName) int {
	if c := strings.Compare(n.Namespace, m.Namespace); c != 0 {
		return c
	}
	if c := strings.Compare(n.Name, m.Name); c != 0 {
		return c
	}
	if c := strings.Compare(n.Port, m.Port); c != 0 {
		return c
	}
	return int(n.Proto) - int(m.Proto)
}

// Service is one port of one Service in one address family. A dual-stack
// Service with two ports is four of them.
type Service struct {
	Name PortName
	// Type is the API's word: ClusterIP, NodePort or LoadBalancer.
	Type      string
	ClusterIP netip.Addr
	Port      uint16
	// NodePort is zero where the Service has none.
	NodePort        uint16
	ExternalIPs     []netip.Addr
	LoadBalancerIPs []netip.Addr
	// SourceRanges limits who may use the LoadBalancerIPs; empty means all.
	SourceRanges []netip.Prefix
	// Affinity is the timeout of session affinity ClientIP, zero for none.
	Affinity time.Duration
	// InternalLocal and ExternalLocal are the traffic policies "Local".
	InternalLocal, ExternalLocal bool
	HealthCheckNodePort          uint16
	// Scheduler is how mode ipvs picks an endpoint for this Service: the name
	// of a scheduler and its flags as ParseScheduler reads them. Empty means
	// the mode's own. Other modes do not look at it.
	Scheduler string
	// Endpoints holds every endpoint of the port, usable or not, in the order
	// of their addresses as text; Select picks.
	Endpoints []Endpoint
	// OtherPorts are the names and protocols of ports that the Service's slices
	// have endpoints for ("web/TCP"), where they have none for this one: for
	// saying why.
	OtherPorts []string
}

// Is6 reports whether the Service is of the IPv6 family.
func (s *Service) Is6() bool { return s.ClusterIP.Is6() }

// ExternallyReachable reports whether the Service has an address that clients
// outside the cluster can use.
func (s *Service) ExternallyReachable() bool {
	return s.NodePort != 0 || len(s.ExternalIPs) > 0 || len(s.LoadBalancerIPs) > 0
}

// Endpoint is one address that can serve a Service port.
type Endpoint struct {
	Addr netip.AddrPort
	// Ready, Serving and Terminating are the EndpointSlice conditions with
	// their defaults applied (nil is ready, nil is serving, nil is not
	// terminating).
	Ready, Serving, Terminating bool
	// Local says the endpoint is on the Snapshot's own node.
	Local bool
	// Namespace and Pod name the pod behind the address, empty if unknown.
	Namespace, Pod string
	Node, Zone     string
	// Weight is the endpoint's share among the others where mode ipvs uses a
	// scheduler that weighs; zero means 1.
	Weight uint16
	// ZoneHints and NodeHints are the slice's topology hints.
	ZoneHints, NodeHints []string
}

// Select is what a Service's policies leave of its endpoints, and why the
// others are out.
type Select struct {
	// Cluster serves traffic under the policy Cluster, Local under Local.
	Cluster, Local []Endpoint
	// Policy says which rule chose Cluster: "Cluster", or "terminating" where
	// no endpoint is ready and terminating ones still serve.
	Policy string
	// LocalPolicy says the same of Local.
	LocalPolicy string
	// Excluded counts what is not in Cluster, LocalExcluded what is not in
	// Local.
	Excluded, LocalExcluded Excluded
}

// Excluded counts the endpoints that are no candidates, by reason.
type Excluded struct {
	NotReady, Terminating, OtherZone, NotLocal, Overlay int
}

// Total is the number of endpoints excluded.
func (e Excluded) Total() int {
	return e.NotReady + e.Terminating + e.OtherZone + e.NotLocal + e.Overlay
}

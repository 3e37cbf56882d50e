package lab

import (
	"net/netip"

	"github.com/kptrace/kptrace/conntrack"
)

// Annotations of a Pod that mean something to the lab.
const (
	// TrafficAnnotation lists what the pod's client connects to; see
	// ParseTraffic.
	TrafficAnnotation = "kptrace.dev/traffic"
	// ExternalAnnotation set to "true" makes the Pod an outside client on the
	// nodes' LAN: it belongs to no node, and its podIP is a LAN address.
	ExternalAnnotation = "kptrace.dev/external"
	// FaultAnnotation has a fault happen to the pod some time after traffic
	// began: "blackhole after=4s".
	FaultAnnotation = "kptrace.dev/fault"
)

// Images of containers that the lab can run. Any other gives a namespace in
// which nothing listens.
const (
	// ServerImage serves every containerPort: HTTP where the port's name
	// begins with "http", else plain TCP or UDP. All of them answer with
	// "namespace/pod client-address".
	ServerImage = "kptrace/server"
	// ClientImage makes the connections that TrafficAnnotation lists.
	ClientImage = "kptrace/client"
)

// Cluster is what the lab builds, as far as it needs to know. It is made by
// Read and ordered by name.
type Cluster struct {
	Nodes    []Node
	Pods     []Pod
	Services []Service
}

// Node is a machine of the cluster.
type Node struct {
	Name string
	// Addr is its address on the LAN, PodCIDR the range of its pods.
	Addr    netip.Addr
	PodCIDR netip.Prefix
}

// Pod is a pod or an outside client.
type Pod struct {
	Namespace, Name string
	// Node is where it runs, empty for outside clients.
	Node     string
	Addr     netip.Addr
	External bool
	// Serves lists the ports a server answers on, Traffic what a client
	// connects to. A pod may have both, or neither.
	Serves  []Port
	Traffic []Target
	// Fault happens by itself; its Kind is empty if none does.
	Fault PlannedFault
}

// ID returns "namespace/name".
func (p *Pod) ID() string { return p.Namespace + "/" + p.Name }

// Port is a port that a server answers on.
type Port struct {
	// Scheme is http, tcp, udp or sctp.
	Scheme string `json:"scheme"`
	Number uint16 `json:"port"`
}

// Service is a Service port as far as the lab resolves names by it.
type Service struct {
	Namespace, Name, Port string
	Proto                 conntrack.Proto
	ClusterIP             netip.Addr
	Number, NodePort      uint16
	// Affinity says that the Service has session affinity ClientIP.
	Affinity bool
}

// pod finds a pod by "namespace/name".
func (c *Cluster) pod(id string) (*Pod, bool) {
	for i := range c.Pods {
		if c.Pods[i].ID() == id {
			return &c.Pods[i], true
		}
	}
	return nil, false
}

// node finds a node by name.
func (c *Cluster) node(name string) (*Node, bool) {
	for i := range c.Nodes {
		if c.Nodes[i].Name == name {
			return &c.Nodes[i], true
		}
	}
	return nil, false
}

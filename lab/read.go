package lab

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/kube"
	"github.com/kptrace/kptrace/proxy/kube/manifests"
)

// Read makes a Cluster of the manifests in dir. Objects that the lab cannot
// build are Problems and left out; what only the proxy needs to understand is
// not looked at. The error says that nothing at all can be built.
func Read(dir string) (*Cluster, []proxy.Problem, error) {
	objects, problems, err := manifests.Load(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("lab: reading the scenario: %w", err)
	}
	r := reader{objects: objects, problems: problems}
	r.readNodes()
	r.readServices()
	r.readPods()
	if len(r.c.Nodes) == 0 {
		return nil, r.problems, fmt.Errorf("lab: no usable Node in %s: a lab needs one", dir)
	}
	return &r.c, r.problems, nil
}

type reader struct {
	objects  *kube.Objects
	problems []proxy.Problem
	c        Cluster
}

func (r *reader) problem(kind, namespace, name, field, format string, args ...any) {
	object := kind + " " + name
	if namespace != "" {
		object = kind + " " + namespace + "/" + name
	}
	r.problems = append(r.problems, proxy.Problem{
		File: r.objects.Origin[kube.Key(kind, namespace, name)], Object: object,
		Field: field, Message: fmt.Sprintf(format, args...),
	})
}

func (r *reader) readNodes() {
	for _, n := range r.objects.Nodes {
		node := Node{Name: n.Name}
		for _, a := range n.Status.Addresses {
			if addr, err := netip.ParseAddr(a.Address); a.Type == "InternalIP" && err == nil && addr.Is4() && !node.Addr.IsValid() {
				node.Addr = addr
			}
		}
		for _, s := range append([]string{n.Spec.PodCIDR}, n.Spec.PodCIDRs...) {
			if p, err := netip.ParsePrefix(s); err == nil && p.Addr().Is4() && !node.PodCIDR.IsValid() {
				node.PodCIDR = p.Masked()
			}
		}
		switch {
		case !node.Addr.IsValid():
			r.problem("Node", "", n.Name, "status.addresses", "has no InternalIP of IPv4")
		case !node.PodCIDR.IsValid() || node.PodCIDR.Bits() > 29:
			r.problem("Node", "", n.Name, "spec.podCIDR", "needs a range of IPv4 of at least 8 addresses, such as 10.244.1.0/24")
		default:
			r.c.Nodes = append(r.c.Nodes, node)
		}
	}
	slices.SortFunc(r.c.Nodes, func(a, b Node) int { return cmp.Compare(a.Name, b.Name) })
}

func (r *reader) readServices() {
	for _, s := range r.objects.Services {
		addr, err := netip.ParseAddr(s.Spec.ClusterIP)
		if err != nil {
			continue // headless, ExternalName, or a Problem of the proxy's
		}
		for _, p := range s.Spec.Ports {
			proto := conntrack.TCP
			if p.Protocol != "" {
				if proto, err = conntrack.ParseProto(string(p.Protocol)); err != nil {
					continue
				}
			}
			r.c.Services = append(r.c.Services, Service{
				Namespace: s.Namespace, Name: s.Name, Port: p.Name, Proto: proto, ClusterIP: addr,
				Number: uint16(p.Port), NodePort: uint16(p.NodePort), Affinity: s.Spec.SessionAffinity == "ClientIP",
			})
		}
	}
	slices.SortFunc(r.c.Services, func(a, b Service) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name),
			cmp.Compare(a.Port, b.Port), cmp.Compare(a.Proto, b.Proto))
	})
}

func (r *reader) readPods() {
	taken := map[netip.Addr]string{}
	for _, n := range r.c.Nodes {
		taken[n.Addr] = "Node " + n.Name
		taken[gateway(n.PodCIDR)] = "the pods' gateway on Node " + n.Name
	}
	for i := range r.objects.Pods {
		p := &r.objects.Pods[i]
		fail := func(field, format string, args ...any) {
			r.problem("Pod", p.Namespace, p.Name, field, format, args...)
		}
		pod := Pod{Namespace: p.Namespace, Name: p.Name, Node: p.Spec.NodeName,
			External: p.Annotations[ExternalAnnotation] == "true"}
		var err error
		if pod.Addr, err = netip.ParseAddr(p.Status.PodIP); err != nil || !pod.Addr.Is4() {
			fail("status.podIP", "is %q: the lab needs an IPv4 address here, as nothing else hands them out", p.Status.PodIP)
			continue
		}
		if other, twice := taken[pod.Addr]; twice {
			fail("status.podIP", "%s already belongs to %s", pod.Addr, other)
			continue
		}
		if pod.External {
			pod.Node = ""
		} else if n, ok := r.c.node(pod.Node); !ok {
			fail("spec.nodeName", "no usable Node %q: put the pod on one of the lab's nodes, or set annotation %s to \"true\"",
				pod.Node, ExternalAnnotation)
			continue
		} else if !n.PodCIDR.Contains(pod.Addr) {
			fail("status.podIP", "%s is not in the range of its node, %s", pod.Addr, n.PodCIDR)
			continue
		}
		taken[pod.Addr] = "Pod " + pod.ID()
		for ci := range p.Spec.Containers {
			ctr := &p.Spec.Containers[ci]
			if ctr.Image != ServerImage {
				continue
			}
			for pi := range ctr.Ports {
				port := &ctr.Ports[pi]
				scheme := strings.ToLower(string(port.Protocol))
				switch {
				case scheme == "udp", scheme == "sctp":
				case strings.HasPrefix(port.Name, "http"):
					scheme = "http"
				default:
					scheme = "tcp"
				}
				pod.Serves = append(pod.Serves, Port{Scheme: scheme, Number: uint16(port.ContainerPort)})
			}
		}
		if text := p.Annotations[TrafficAnnotation]; text != "" {
			if pod.Traffic, err = ParseTraffic(text, r.c.resolve(p.Namespace)); err != nil {
				fail("metadata.annotations."+TrafficAnnotation, "%v", err)
			}
		}
		if text, ok := p.Annotations[FaultAnnotation]; ok {
			if pod.Fault, err = parseFault(text); err != nil {
				fail("metadata.annotations."+FaultAnnotation, "%v", err)
				pod.Fault = PlannedFault{}
			}
		}
		r.c.Pods = append(r.c.Pods, pod)
	}
	slices.SortFunc(r.c.Pods, func(a, b Pod) int { return cmp.Compare(a.ID(), b.ID()) })
}

// resolve returns a function that finds the address of a name as a pod of the
// namespace writes it: an IP address, a node, "service" or
// "service.namespace" with cluster DNS's endings.
func (c *Cluster) resolve(namespace string) func(host string) (netip.Addr, error) {
	return func(host string) (netip.Addr, error) {
		if a, err := netip.ParseAddr(host); err == nil {
			return a, nil
		}
		if n, ok := c.node(host); ok {
			return n.Addr, nil
		}
		short := strings.TrimSuffix(strings.TrimSuffix(host, ".cluster.local"), ".svc")
		name, ns, ok := strings.Cut(short, ".")
		if !ok {
			ns = namespace
		}
		for i := range c.Services {
			if s := &c.Services[i]; s.Name == name && s.Namespace == ns {
				return s.ClusterIP, nil
			}
		}
		return netip.Addr{}, fmt.Errorf("%q is no address, node or Service of this lab", host)
	}
}

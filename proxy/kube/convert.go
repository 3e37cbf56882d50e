package kube

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

const (
	labelProxyName = "service.kubernetes.io/service-proxy-name"
	labelHeadless  = "service.kubernetes.io/headless"
	labelZone      = "topology.kubernetes.io/zone"

	defaultAffinity = 10800 * time.Second
	maxAffinity     = 86400
)

// Convert makes the Snapshot of the named node. The same objects give the same
// Snapshot, in whatever order they come.
func Convert(o *Objects, node string) *proxy.Snapshot {
	c := &converter{objects: o, snap: &proxy.Snapshot{
		Node:  proxy.Node{Name: node},
		Pods:  map[netip.Addr]proxy.Pod{},
		Nodes: map[netip.Addr]string{},
	}}
	c.nodes()
	c.pods()
	c.services()
	c.nodePorts()
	c.endpoints()
	s := c.snap
	slices.SortFunc(s.Services, func(a, b proxy.Service) int {
		if n := a.Name.Compare(b.Name); n != 0 {
			return n
		}
		return a.ClusterIP.Compare(b.ClusterIP)
	})
	slices.SortFunc(s.Skipped, func(a, b proxy.Skipped) int {
		return strings.Compare(a.Namespace+"/"+a.Name, b.Namespace+"/"+b.Name)
	})
	slices.SortFunc(s.Problems, func(a, b proxy.Problem) int { return strings.Compare(a.Error(), b.Error()) })
	return s
}

type converter struct {
	objects *Objects
	snap    *proxy.Snapshot
}

// problem notes a fault of one field of one object.
func (c *converter) problem(kind, namespace, name, field, format string, args ...any) {
	object := kind + " " + name
	if namespace != "" {
		object = kind + " " + namespace + "/" + name
	}
	c.snap.Problems = append(c.snap.Problems, proxy.Problem{
		File: c.objects.file(kind, namespace, name), Object: object,
		Field: field, Message: fmt.Sprintf(format, args...),
	})
}

func (c *converter) nodes() {
	found := false
	for _, n := range c.objects.Nodes {
		own := n.Name == c.snap.Node.Name
		found = found || own
		for i, a := range n.Status.Addresses {
			if a.Type != corev1.NodeInternalIP && a.Type != corev1.NodeExternalIP {
				continue
			}
			ip, err := netip.ParseAddr(a.Address)
			if err != nil {
				c.problem("Node", "", n.Name, fmt.Sprintf("status.addresses[%d].address", i),
					"%q is not an IP address", a.Address)
				continue
			}
			c.snap.Nodes[ip.Unmap()] = n.Name
			if own {
				c.snap.Node.Addrs = append(c.snap.Node.Addrs, ip.Unmap())
			}
		}
		if !own {
			continue
		}
		c.snap.Node.Zone = n.Labels[labelZone]
		cidrs := n.Spec.PodCIDRs
		if len(cidrs) == 0 && n.Spec.PodCIDR != "" {
			cidrs = []string{n.Spec.PodCIDR}
		}
		for i, s := range cidrs {
			p, err := netip.ParsePrefix(s)
			if err != nil {
				c.problem("Node", "", n.Name, fmt.Sprintf("spec.podCIDRs[%d]", i), "%q is not a CIDR", s)
				continue
			}
			c.snap.Node.PodCIDRs = append(c.snap.Node.PodCIDRs, p.Masked())
		}
	}
	if !found && len(c.objects.Nodes) > 0 {
		c.problem("Node", "", c.snap.Node.Name, "", "no such Node: no endpoint counts as local; give the node's name by --node or add the Node")
	}
}

func (c *converter) pods() {
	for _, p := range c.objects.Pods {
		if p.Spec.HostNetwork {
			continue // its address is the node's
		}
		ips := []string{p.Status.PodIP}
		for _, ip := range p.Status.PodIPs {
			ips = append(ips, ip.IP)
		}
		for _, s := range ips {
			if s == "" {
				continue
			}
			ip, err := netip.ParseAddr(s)
			if err != nil {
				c.problem("Pod", p.Namespace, p.Name, "status.podIP", "%q is not an IP address", s)
				continue
			}
			if other, ok := c.snap.Pods[ip.Unmap()]; ok && (other.Namespace != p.Namespace || other.Name != p.Name) {
				c.problem("Pod", p.Namespace, p.Name, "status.podIP", "%s is also the address of pod %s/%s", ip, other.Namespace, other.Name)
				continue
			}
			c.snap.Pods[ip.Unmap()] = proxy.Pod{
				Namespace: p.Namespace, Name: p.Name, Node: p.Spec.NodeName, Workload: workload(&p),
			}
		}
	}
}

// workload names a pod's owner; a ReplicaSet's hash suffix is cut, which gives
// the Deployment's name without asking for the ReplicaSet.
func workload(p *corev1.Pod) string {
	for _, o := range p.OwnerReferences {
		if o.Controller == nil || !*o.Controller {
			continue
		}
		hash := p.Labels["pod-template-hash"]
		if name, ok := strings.CutSuffix(o.Name, "-"+hash); ok && o.Kind == "ReplicaSet" && hash != "" {
			return "Deployment/" + name
		}
		return o.Kind + "/" + o.Name
	}
	return ""
}

func (c *converter) services() {
	seen := map[string]bool{}
	for i := range c.objects.Services {
		svc := &c.objects.Services[i]
		key := svc.Namespace + "/" + svc.Name
		if seen[key] {
			c.problem("Service", svc.Namespace, svc.Name, "metadata.name", "defined twice; the first one is used")
			continue
		}
		seen[key] = true
		if reason := skip(svc); reason != "" {
			c.snap.Skipped = append(c.snap.Skipped, proxy.Skipped{Namespace: svc.Namespace, Name: svc.Name, Reason: reason})
			continue
		}
		c.service(svc)
	}
}

// skip says why a Service is not proxied on purpose, empty if it is.
func skip(svc *corev1.Service) string {
	switch {
	case svc.Labels[labelProxyName] != "":
		return "service-proxy-name"
	case svc.Spec.Type == corev1.ServiceTypeExternalName:
		return "ExternalName"
	case svc.Spec.ClusterIP == corev1.ClusterIPNone:
		return "headless"
	}
	return ""
}

func (c *converter) service(svc *corev1.Service) {
	bad := func(field, format string, args ...any) {
		c.problem("Service", svc.Namespace, svc.Name, field, format, args...)
	}
	ips := svc.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{svc.Spec.ClusterIP}
	}
	affinity := time.Duration(0)
	switch svc.Spec.SessionAffinity {
	case "", corev1.ServiceAffinityNone:
	case corev1.ServiceAffinityClientIP:
		affinity = defaultAffinity
		if a := svc.Spec.SessionAffinityConfig; a != nil && a.ClientIP != nil && a.ClientIP.TimeoutSeconds != nil {
			t := *a.ClientIP.TimeoutSeconds
			if t < 1 || t > maxAffinity {
				bad("spec.sessionAffinityConfig.clientIP.timeoutSeconds", "%d is not within 1 to %d; the default of %d is used", t, maxAffinity, int(defaultAffinity.Seconds()))
			} else {
				affinity = time.Duration(t) * time.Second
			}
		}
	default:
		bad("spec.sessionAffinity", "%q is neither None nor ClientIP; None is used", svc.Spec.SessionAffinity)
	}
	names := map[proxy.PortName]bool{}
	for _, text := range ips {
		ip, err := netip.ParseAddr(text)
		if err != nil {
			if text == "" {
				bad("spec.clusterIP", "is empty: give the Service an address from the service range, or None")
			} else {
				bad("spec.clusterIP", "%q is not an IP address", text)
			}
			continue
		}
		if len(svc.Spec.Ports) == 0 {
			bad("spec.ports", "is empty: a Service needs at least one port")
		}
		for i, port := range svc.Spec.Ports {
			field := fmt.Sprintf("spec.ports[%d]", i)
			proto, err := conntrack.ParseProto(string(port.Protocol))
			if port.Protocol == "" {
				proto, err = conntrack.TCP, nil
			}
			if err != nil || proto == conntrack.ICMP || proto == conntrack.ICMPv6 {
				bad(field+".protocol", "%q is not TCP, UDP or SCTP", port.Protocol)
				continue
			}
			if port.Port < 1 || port.Port > 65535 {
				bad(field+".port", "%d is not within 1 to 65535", port.Port)
				continue
			}
			s := proxy.Service{
				Name:      proxy.PortName{Namespace: svc.Namespace, Name: svc.Name, Port: port.Name, Proto: proto},
				Type:      string(svc.Spec.Type),
				ClusterIP: ip.Unmap(), Port: uint16(port.Port), Affinity: affinity,
				HealthCheckNodePort: uint16(svc.Spec.HealthCheckNodePort),
			}
			if s.Type == "" {
				s.Type = string(corev1.ServiceTypeClusterIP)
			}
			if p := svc.Spec.InternalTrafficPolicy; p != nil {
				s.InternalLocal = *p == corev1.ServiceInternalTrafficPolicyLocal
			}
			s.ExternalLocal = svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
			if s.Type != string(corev1.ServiceTypeClusterIP) && port.NodePort != 0 {
				if port.NodePort < 1 || port.NodePort > 65535 {
					bad(field+".nodePort", "%d is not within 1 to 65535", port.NodePort)
				} else {
					s.NodePort = uint16(port.NodePort)
				}
			}
			if names[s.Name] && len(ips) == 1 {
				bad(field+".name", "port name %q is used twice for %s; this port is left out", port.Name, proto)
				continue
			}
			names[s.Name] = true
			c.addresses(svc, &s)
			c.snap.Services = append(c.snap.Services, s)
		}
	}
}

// addresses fills in the external addresses of the Service's own family.
func (c *converter) addresses(svc *corev1.Service, s *proxy.Service) {
	parse := func(field, text string) (netip.Addr, bool) {
		ip, err := netip.ParseAddr(text)
		if err != nil {
			c.problem("Service", svc.Namespace, svc.Name, field, "%q is not an IP address", text)
			return ip, false
		}
		return ip.Unmap(), ip.Unmap().Is6() == s.Is6()
	}
	for i, text := range svc.Spec.ExternalIPs {
		if ip, ok := parse(fmt.Sprintf("spec.externalIPs[%d]", i), text); ok {
			s.ExternalIPs = append(s.ExternalIPs, ip)
		}
	}
	for i, in := range svc.Status.LoadBalancer.Ingress {
		if in.IP == "" || in.IPMode != nil && *in.IPMode == corev1.LoadBalancerIPModeProxy {
			continue
		}
		if ip, ok := parse(fmt.Sprintf("status.loadBalancer.ingress[%d].ip", i), in.IP); ok {
			s.LoadBalancerIPs = append(s.LoadBalancerIPs, ip)
		}
	}
	for i, text := range svc.Spec.LoadBalancerSourceRanges {
		p, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil {
			c.problem("Service", svc.Namespace, svc.Name, fmt.Sprintf("spec.loadBalancerSourceRanges[%d]", i), "%q is not a CIDR", text)
			continue
		}
		if p.Addr().Is6() == s.Is6() {
			s.SourceRanges = append(s.SourceRanges, p.Masked())
		}
	}
}

// nodePorts finds node ports and cluster addresses that two Services claim.
// The first by name keeps it.
func (c *converter) nodePorts() {
	type claim struct {
		ip    netip.Addr
		port  uint16
		proto conntrack.Proto
	}
	slices.SortStableFunc(c.snap.Services, func(a, b proxy.Service) int { return a.Name.Compare(b.Name) })
	owner := map[claim]proxy.PortName{}
	keep := c.snap.Services[:0]
	for _, s := range c.snap.Services {
		k := claim{s.ClusterIP, s.Port, s.Name.Proto}
		if other, ok := owner[k]; ok {
			c.problem("Service", s.Name.Namespace, s.Name.Name, "spec.clusterIP",
				"%s port %d/%s already belongs to %s; this port is left out", k.ip, k.port, k.proto, other)
			continue
		}
		owner[k] = s.Name
		if s.NodePort != 0 {
			family := netip.IPv4Unspecified()
			if s.Is6() {
				family = netip.IPv6Unspecified()
			}
			k := claim{family, s.NodePort, s.Name.Proto}
			if other, ok := owner[k]; ok {
				c.problem("Service", s.Name.Namespace, s.Name.Name, "spec.ports[].nodePort",
					"%d/%s already belongs to %s; the node port of this Service is left out", k.port, k.proto, other)
				s.NodePort = 0
			} else {
				owner[k] = s.Name
			}
		}
		keep = append(keep, s)
	}
	c.snap.Services = keep
}

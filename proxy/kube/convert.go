package kube

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/kptrace/kptrace/proxy"
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
	parts := c.services(c.slices())
	Names(c.snap.Pods, parts)
	Assemble(c.snap, parts)
	for i := range c.snap.Problems {
		p := &c.snap.Problems[i]
		p.File = o.file(p.Object)
	}
	slices.SortFunc(c.snap.Problems, func(a, b proxy.Problem) int { return strings.Compare(a.Error(), b.Error()) })
	return c.snap
}

type converter struct {
	objects *Objects
	snap    *proxy.Snapshot
}

// problem notes a fault of one field of one object.
func (c *converter) problem(kind, namespace, name, field, format string, args ...any) {
	c.snap.Problems = append(c.snap.Problems, proxy.Problem{
		Object: objectName(kind, namespace, name), Field: field, Message: fmt.Sprintf(format, args...),
	})
}

func (c *converter) nodes() {
	found := false
	for i := range c.objects.Nodes {
		n := &c.objects.Nodes[i]
		node, problems := ConvertNode(n)
		c.snap.Problems = append(c.snap.Problems, problems...)
		for _, ip := range node.Addrs {
			c.snap.Nodes[ip] = n.Name
		}
		if n.Name == c.snap.Node.Name {
			found = true
			c.snap.Node = node
		}
	}
	if !found && len(c.objects.Nodes) > 0 {
		c.problem("Node", "", c.snap.Node.Name, "", "no such Node: no endpoint counts as local; give the node's name by --node or add the Node")
	}
}

func (c *converter) pods() {
	for i := range c.objects.Pods {
		p := &c.objects.Pods[i]
		pod, ips, err := ConvertPod(p)
		if err != nil {
			c.problem("Pod", p.Namespace, p.Name, "status.podIP", "%v", err)
		}
		for _, ip := range ips {
			if other, ok := c.snap.Pods[ip]; ok && (other.Namespace != p.Namespace || other.Name != p.Name) {
				c.problem("Pod", p.Namespace, p.Name, "status.podIP", "%s is also the address of pod %s/%s", ip, other.Namespace, other.Name)
				continue
			}
			c.snap.Pods[ip] = pod
		}
	}
}

// slices groups slices by the namespace/name of their Service.
func (c *converter) slices() map[string][]*discoveryv1.EndpointSlice {
	byService := map[string][]*discoveryv1.EndpointSlice{}
	known := map[string]bool{}
	for i := range c.objects.Services {
		known[c.objects.Services[i].Namespace+"/"+c.objects.Services[i].Name] = true
	}
	for i := range c.objects.Slices {
		slice := &c.objects.Slices[i]
		if _, ok := slice.Labels[labelHeadless]; ok {
			continue
		}
		service := ServiceOf(slice)
		switch {
		case service == "":
			c.problem("EndpointSlice", slice.Namespace, slice.Name, "metadata.labels",
				"has no label %s: it belongs to no Service", discoveryv1.LabelServiceName)
		case !known[service]:
			c.problem("EndpointSlice", slice.Namespace, slice.Name, "metadata.labels",
				"belongs to Service %s, which does not exist", service)
		default:
			byService[service] = append(byService[service], slice)
		}
	}
	return byService
}

// ServiceOf returns the namespace/name of the Service that a slice belongs to,
// empty if it names none.
func ServiceOf(slice *discoveryv1.EndpointSlice) string {
	name := slice.Labels[discoveryv1.LabelServiceName]
	if name == "" {
		return ""
	}
	return slice.Namespace + "/" + name
}

func (c *converter) services(byService map[string][]*discoveryv1.EndpointSlice) []*Part {
	parts := make([]*Part, 0, len(c.objects.Services))
	seen := map[string]bool{}
	for i := range c.objects.Services {
		svc := &c.objects.Services[i]
		key := svc.Namespace + "/" + svc.Name
		if seen[key] {
			c.problem("Service", svc.Namespace, svc.Name, "metadata.name", "defined twice; the first one is used")
			continue
		}
		seen[key] = true
		p := ConvertService(svc, byService[key], c.snap.Node.Name, c.snap.Pods)
		p.File = c.objects.Origin[Key("Service", svc.Namespace, svc.Name)]
		parts = append(parts, p)
	}
	return parts
}

// ConvertPod returns what is known of a pod and its addresses: none for a pod
// that uses its node's, or that has ended. The error is about one address; the
// others are returned all the same.
func ConvertPod(p *corev1.Pod) (proxy.Pod, []netip.Addr, error) {
	pod := proxy.Pod{Namespace: p.Namespace, Name: p.Name, Node: p.Spec.NodeName, Workload: workload(p)}
	if p.Spec.HostNetwork || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return pod, nil, nil
	}
	var ips []netip.Addr
	var bad error
	add := func(text string) {
		if ip, err := parseAddr(text); text != "" && err != nil {
			bad = err
		} else if err == nil && !slices.Contains(ips, ip) {
			ips = append(ips, ip)
		}
	}
	add(p.Status.PodIP)
	for _, ip := range p.Status.PodIPs {
		add(ip.IP)
	}
	return pod, ips, bad
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

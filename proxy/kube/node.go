package kube

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/kptrace/kptrace/proxy"
)

// ConvertNode returns a node as proxying needs it. Its internal addresses come
// before its external ones, as kube-proxy chooses among them, and otherwise in
// the order in which the Node lists them.
func ConvertNode(n *corev1.Node) (proxy.Node, []proxy.Problem) {
	node := proxy.Node{Name: n.Name, Zone: n.Labels[corev1.LabelTopologyZone], Leaving: leaving(n)}
	var problems []proxy.Problem
	bad := func(field string, err error) {
		problems = append(problems, proxy.Problem{Object: objectName("Node", "", n.Name), Field: field, Message: err.Error()})
	}
	var external []netip.Addr
	for i, a := range n.Status.Addresses {
		if a.Type != corev1.NodeInternalIP && a.Type != corev1.NodeExternalIP {
			continue
		}
		ip, err := parseAddr(a.Address)
		switch {
		case err != nil:
			bad(fmt.Sprintf("status.addresses[%d].address", i), err)
		case a.Type == corev1.NodeInternalIP:
			node.Addrs = append(node.Addrs, ip)
		default:
			external = append(external, ip)
		}
	}
	for _, ip := range external {
		if !slices.Contains(node.Addrs, ip) {
			node.Addrs = append(node.Addrs, ip)
		}
	}
	cidrs := n.Spec.PodCIDRs
	if len(cidrs) == 0 && n.Spec.PodCIDR != "" {
		cidrs = []string{n.Spec.PodCIDR}
	}
	for i, s := range cidrs {
		p, err := parsePrefix(s)
		if err != nil {
			bad(fmt.Sprintf("spec.podCIDRs[%d]", i), err)
			continue
		}
		node.PodCIDRs = append(node.PodCIDRs, p)
	}
	return node, problems
}

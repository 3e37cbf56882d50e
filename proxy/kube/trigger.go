package kube

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/kptrace/kptrace/proxy"
)

// taintToBeDeleted is set by the cluster autoscaler before it deletes a node.
const taintToBeDeleted = "ToBeDeletedByClusterAutoscaler"

// leaving says why a node should get no more traffic from load balancers
// (KEP-3836), empty if it should.
func leaving(n *corev1.Node) string {
	if !n.DeletionTimestamp.IsZero() {
		return "it is being deleted"
	}
	for _, t := range n.Spec.Taints {
		if t.Key == taintToBeDeleted {
			return "the cluster autoscaler is about to delete it"
		}
	}
	return ""
}

// trigger notes when the change behind a slice happened. What cannot be read
// is no Problem: it is a measurement, of no consequence to traffic.
func (p *part) trigger(slice *discoveryv1.EndpointSlice) {
	at, err := time.Parse(time.RFC3339Nano, slice.Annotations[corev1.EndpointsLastChangeTriggerTime])
	if err != nil {
		return
	}
	if p.Triggers == nil {
		p.Triggers = map[string]proxy.Trigger{}
	}
	p.Triggers[slice.Namespace+"/"+slice.Name] = proxy.Trigger{
		At: at, IP6: slice.AddressType == discoveryv1.AddressTypeIPv6,
	}
}

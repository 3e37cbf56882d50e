package kube

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestTriggers(t *testing.T) {
	at := time.Date(2026, 5, 1, 10, 0, 0, 123456789, time.UTC)
	slice := func(name, annotation string, kind discoveryv1.AddressType) discoveryv1.EndpointSlice {
		return discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: "shop", Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: "foo"},
				Annotations: map[string]string{corev1.EndpointsLastChangeTriggerTime: annotation},
			},
			AddressType: kind,
		}
	}
	svc := corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "foo"}}
	svc.Spec.ClusterIP = "10.96.0.1"
	svc.Spec.Ports = []corev1.ServicePort{{Port: 80}}
	snap := Convert(&Objects{
		Services: []corev1.Service{svc},
		Slices: []discoveryv1.EndpointSlice{
			slice("foo-4", at.Format(time.RFC3339Nano), discoveryv1.AddressTypeIPv4),
			slice("foo-6", at.Add(time.Second).Format(time.RFC3339Nano), discoveryv1.AddressTypeIPv6),
			slice("foo-x", "yesterday", discoveryv1.AddressTypeIPv4),
		},
	}, "node1")
	if len(snap.Triggers) != 2 || !snap.Triggers["shop/foo-4"].At.Equal(at) || snap.Triggers["shop/foo-4"].IP6 ||
		!snap.Triggers["shop/foo-6"].At.Equal(at.Add(time.Second)) || !snap.Triggers["shop/foo-6"].IP6 {
		t.Errorf("triggers %v", snap.Triggers)
	}
}

func TestLeaving(t *testing.T) {
	now := metav1.Now()
	for _, tt := range []struct {
		name string
		node corev1.Node
		want bool
	}{
		{"at work", corev1.Node{Spec: corev1.NodeSpec{Unschedulable: true, Taints: []corev1.Taint{{Key: "other"}}}}, false},
		{"drained by the autoscaler", corev1.Node{Spec: corev1.NodeSpec{Taints: []corev1.Taint{{Key: "ToBeDeletedByClusterAutoscaler"}}}}, true},
		{"deleted", corev1.Node{ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &now}}, true},
	} {
		tt.node.Name = "node1"
		node, problems := ConvertNode(&tt.node)
		if got := node.Leaving != ""; got != tt.want || len(problems) > 0 {
			t.Errorf("%s: leaving %q, problems %v", tt.name, node.Leaving, problems)
		}
	}
}

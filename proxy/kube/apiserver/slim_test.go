package apiserver

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestStripSlice checks that what stays of a slice means the same, and that what
// endpoints have alike is there once.
func TestStripSlice(t *testing.T) {
	make := func() *discoveryv1.EndpointSlice {
		s := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{
			Name: "foo-1", Namespace: "shop", ManagedFields: []metav1.ManagedFieldsEntry{{}},
			Labels: map[string]string{discoveryv1.LabelServiceName: "foo", "app": "foo"}}}
		for _, ip := range []string{"10.0.0.1", "10.0.0.2"} {
			node, zone, yes, no := "node1", "a", true, false
			s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{ip}, NodeName: &node, Zone: &zone,
				Conditions: discoveryv1.EndpointConditions{Ready: &yes, Terminating: &no},
				TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: "shop", Name: "foo-" + ip, UID: "1"}})
		}
		return s
	}
	sh := newSharing()
	a, b := sh.stripSlice(make()).(*discoveryv1.EndpointSlice), sh.stripSlice(make()).(*discoveryv1.EndpointSlice)
	a = sh.stripSlice(a).(*discoveryv1.EndpointSlice) // a reflector may do it twice
	if len(a.Labels) != 1 || a.Labels[discoveryv1.LabelServiceName] != "foo" || a.ManagedFields != nil {
		t.Errorf("metadata %+v", a.ObjectMeta)
	}
	for i := range a.Endpoints {
		x, y := &a.Endpoints[i], &b.Endpoints[i]
		if x.Addresses[0] != y.Addresses[0] || *x.NodeName != "node1" || *x.Zone != "a" || !*x.Conditions.Ready ||
			x.Conditions.Serving != nil || *x.Conditions.Terminating || x.TargetRef.Name != "foo-"+x.Addresses[0] || x.TargetRef.Kind != "Pod" {
			t.Errorf("endpoint %+v", x)
		}
		if x.NodeName != y.NodeName || x.Zone != a.Endpoints[0].Zone || x.Conditions.Ready != y.Conditions.Ready {
			t.Errorf("endpoint %d shares nothing", i)
		}
	}
	for i := range 2 * maxShared {
		if s := string(rune(i)); sh.text(s) != s {
			t.Fatal("another text")
		}
	}
	if len(sh.texts) > maxShared {
		t.Errorf("%d texts are kept", len(sh.texts))
	}
}

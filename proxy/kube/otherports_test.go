package kube_test

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"sigs.k8s.io/yaml"

	"github.com/kptrace/kptrace/proxy/kube"
)

// TestOtherPorts wants a Service port without endpoints to know what its slices
// have instead.
func TestOtherPorts(t *testing.T) {
	var svc corev1.Service
	var slice discoveryv1.EndpointSlice
	for text, into := range map[string]any{
		`{metadata: {name: foo, namespace: shop}, spec: {clusterIP: 10.96.0.10, ports: [{name: http, port: 80}]}}`: &svc,
		`{metadata: {name: foo-1, namespace: shop, labels: {kubernetes.io/service-name: foo}}, addressType: IPv4,
  ports: [{name: web, port: 8080}], endpoints: [{addresses: [10.244.1.2]}]}`: &slice,
	} {
		if err := yaml.Unmarshal([]byte(text), into); err != nil {
			t.Fatal(err)
		}
	}
	got := kube.Convert(&kube.Objects{Services: []corev1.Service{svc}, Slices: []discoveryv1.EndpointSlice{slice}}, "node1").Services
	if len(got) != 1 || len(got[0].Endpoints) != 0 || !slices.Equal(got[0].OtherPorts, []string{"web/TCP"}) {
		t.Errorf("got %+v", got)
	}
}

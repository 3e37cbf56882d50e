package kube

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// An annotated Service has a scheduler and weights; what is wrong with an
// annotation is said and changes nothing else.
func TestAnnotations(t *testing.T) {
	port, name := int32(8080), "http"
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "foo"}}
	svc.Spec.ClusterIP = "10.96.0.10"
	svc.Spec.Ports = []corev1.ServicePort{{Name: "http", Port: 80}}
	slice := &discoveryv1.EndpointSlice{AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}}}
	for i, pod := range []string{"a", "b", "c", "d"} {
		node, zone := "node"+pod, "east"
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{"10.244.1." + string(rune('1'+i))}, NodeName: &node, Zone: &zone,
			TargetRef: &corev1.ObjectReference{Kind: "Pod", Name: "foo-" + pod},
		})
	}
	svc.Annotations = map[string]string{
		annotationScheduler: " sh,port ",
		annotationWeights:   "foo-a=3, 10.244.1.2=4,node/nodec=5 , zone/east=6,foo-d",
	}
	p := ConvertService(svc, []*discoveryv1.EndpointSlice{slice}, "n", nil)
	if len(p.Services) != 1 || p.Services[0].Scheduler != "sh,port" {
		t.Fatalf("got %+v", p.Services)
	}
	for i, want := range []uint16{3, 4, 5, 6} {
		if got := p.Services[0].Endpoints[i]; got.Weight != want {
			t.Errorf("%s has weight %d, want %d", got.Pod, got.Weight, want)
		}
	}
	if len(p.Problems) != 1 || !strings.Contains(p.Problems[0].Error(), `Service shop/foo: metadata.annotations[kptrace.dev/ipvs-weights]: "foo-d"`) {
		t.Errorf("problems: %v", p.Problems)
	}

	svc.Annotations = map[string]string{annotationScheduler: "fastest!", annotationWeights: "foo-a=0"}
	p = ConvertService(svc, []*discoveryv1.EndpointSlice{slice}, "n", nil)
	if s := p.Services[0]; s.Scheduler != "" || s.Endpoints[0].Weight != 0 || len(p.Problems) != 2 {
		t.Errorf("scheduler %q, weight %d, problems %v", s.Scheduler, s.Endpoints[0].Weight, p.Problems)
	}
}

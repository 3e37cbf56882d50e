//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
)

// What the fixture's node is called and where it is. Its addresses are on lo of
// every namespace under test; the second pair is on no Node.
const (
	namespace   = "shop"
	nodeName    = "node1"
	nodeZone    = "zone1"
	clusterCIDR = "10.244.0.0/16,fd00:244::/48"
)

var localAddrs = []string{"192.0.2.1/32", "fd00:1::1/128", "198.51.100.1/32", "fd00:2::1/128"}

// objects is what a test puts into the API server.
type objects struct {
	services []*corev1.Service
	slices   []*discoveryv1.EndpointSlice
}

// add adds a Service and its EndpointSlices.
//
// ports is a list of NAME:PORT[/PROTO] with endpoints at the same port numbers
// plus 8000. endpoints is a list of "a" to "i", each perhaps followed by words:
// "local" puts it on our node, "terminating", "unready" and "dead" (terminating
// and no longer serving) are its conditions, "zone=X" and "node=X" its hints.
// Every endpoint has an address of each family that the Service has.
func (o *objects) add(name, ports, endpoints string, edit ...func(*corev1.Service)) {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       corev1.ServiceSpec{IPFamilyPolicy: ptr(corev1.IPFamilyPolicyPreferDualStack)},
	}
	for _, p := range strings.Fields(ports) {
		head, proto, ok := strings.Cut(p, "/")
		if !ok {
			proto = "TCP"
		}
		portName, number, _ := strings.Cut(head, ":")
		port, err := strconv.Atoi(number)
		if err != nil {
			panic(err)
		}
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{
			Name: portName, Protocol: corev1.Protocol(proto), Port: int32(port), TargetPort: intstr.FromInt(port + 8000),
		})
	}
	for _, e := range edit {
		e(s)
	}
	o.services = append(o.services, s)
	if strings.TrimSpace(endpoints) == "" {
		return
	}
	for _, family := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
		o.slices = append(o.slices, slice(s, family, endpoints))
	}
}

func slice(s *corev1.Service, family discoveryv1.AddressType, endpoints string) *discoveryv1.EndpointSlice {
	e := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: s.Name + "-" + strings.ToLower(string(family)),
			Labels: map[string]string{discoveryv1.LabelServiceName: s.Name},
		},
		AddressType: family,
	}
	if s.Spec.ClusterIP == corev1.ClusterIPNone {
		e.Labels[corev1.IsHeadlessService] = ""
	}
	for _, p := range s.Spec.Ports {
		e.Ports = append(e.Ports, discoveryv1.EndpointPort{
			Name: &p.Name, Protocol: &p.Protocol, Port: ptr(p.TargetPort.IntVal),
		})
	}
	for _, text := range strings.Split(endpoints, ",") {
		e.Endpoints = append(e.Endpoints, endpoint(family, strings.Fields(text)))
	}
	return e
}

func endpoint(family discoveryv1.AddressType, words []string) discoveryv1.Endpoint {
	host := int(words[0][0]-'a') + 10
	e := discoveryv1.Endpoint{NodeName: ptr("node2"), Addresses: []string{fmt.Sprintf("10.244.2.%d", host)}}
	if family == discoveryv1.AddressTypeIPv6 {
		e.Addresses = []string{fmt.Sprintf("fd00:244:0:2::%x", host)}
	}
	ready, serving, terminating := true, true, false
	for _, w := range words[1:] {
		key, value, _ := strings.Cut(w, "=")
		switch key {
		case "local":
			e.NodeName = ptr(nodeName)
		case "unready":
			ready, serving = false, false
		case "terminating":
			ready, terminating = false, true
		case "dead":
			ready, serving, terminating = false, false, true
		case "zone", "node":
			if e.Hints == nil {
				e.Hints = &discoveryv1.EndpointHints{}
			}
			if key == "zone" {
				e.Hints.ForZones = append(e.Hints.ForZones, discoveryv1.ForZone{Name: value})
			} else {
				e.Hints.ForNodes = append(e.Hints.ForNodes, discoveryv1.ForNode{Name: value})
			}
		default:
			panic("unknown word " + w)
		}
	}
	e.Conditions = discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating}
	return e
}

// create writes the objects, and the Node they are for.
func (o *objects) create(t *testing.T, client kubernetes.Interface) {
	t.Helper()
	ctx := t.Context()
	_, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	createNode(t, client, nodeName)
	o.write(t, client)
}

// write writes the objects alone.
func (o *objects) write(t *testing.T, client kubernetes.Interface) {
	t.Helper()
	ctx := t.Context()
	for _, s := range o.services {
		if err := createService(ctx, client, s); err != nil {
			t.Fatalf("Service %s: %v", s.Name, err)
		}
	}
	for _, s := range o.slices {
		if _, err := client.DiscoveryV1().EndpointSlices(namespace).Create(ctx, s, metav1.CreateOptions{}); err != nil {
			t.Fatalf("EndpointSlice %s: %v", s.Name, err)
		}
	}
}

// createService writes the spec, then what a cloud would write to the status.
func createService(ctx context.Context, client kubernetes.Interface, s *corev1.Service) error {
	made, err := client.CoreV1().Services(namespace).Create(ctx, s, metav1.CreateOptions{})
	if err != nil || len(s.Status.LoadBalancer.Ingress) == 0 {
		return err
	}
	made.Status = s.Status
	_, err = client.CoreV1().Services(namespace).UpdateStatus(ctx, made, metav1.UpdateOptions{})
	return err
}

func createNode(t *testing.T, client kubernetes.Interface, name string) {
	t.Helper()
	n := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{
			corev1.LabelHostname: name, corev1.LabelTopologyZone: nodeZone,
		}},
		Spec: corev1.NodeSpec{PodCIDR: "10.244.1.0/24", PodCIDRs: []string{"10.244.1.0/24", "fd00:244:0:1::/64"}},
	}
	made, err := client.CoreV1().Nodes().Create(t.Context(), n, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range localAddrs[:2] {
		made.Status.Addresses = append(made.Status.Addresses, corev1.NodeAddress{
			Type: corev1.NodeInternalIP, Address: netip.MustParsePrefix(a).Addr().String(),
		})
	}
	if _, err := client.CoreV1().Nodes().UpdateStatus(t.Context(), made, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func ptr[T any](v T) *T { return &v }

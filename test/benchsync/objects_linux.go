package main

import (
	"context"
	"fmt"
	"net/netip"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	nodeName = "node1"
	podRange = "10.128.0.0/9"
	// workers is how many objects are created at once.
	workers = 32
)

// nodeAddr is the node's.
var nodeAddr = netip.AddrFrom4([4]byte{192, 0, 2, 1})

// objects are those in the API server.
type objects struct {
	cell
	client kubernetes.Interface
	moves  int
}

// newObjects writes a Node and the Services of a cell.
func newObjects(ctx context.Context, kubeconfig string, c cell) (*objects, error) {
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	cfg.QPS, cfg.ContentType = -1, "application/vnd.kubernetes.protobuf"
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, err
	}
	o := &objects{cell: c, client: client}
	node, err := client.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName}}, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: nodeAddr.String()}}
	if _, err := client.CoreV1().Nodes().UpdateStatus(ctx, node, metav1.UpdateOptions{}); err != nil {
		return nil, err
	}
	for i := range min(100, c.Services+1) {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespaceOf(i)}}
		if _, err := client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
			return nil, err
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	for i := range c.Services {
		g.Go(func() error {
			if err := o.createSlice(ctx, i); err != nil {
				return err
			}
			return o.createService(ctx, i)
		})
	}
	return o, g.Wait()
}

func namespaceOf(i int) string { return fmt.Sprintf("ns%d", i%100) }
func nameOf(i int) string      { return fmt.Sprintf("svc%06d", i) }
func addrOf(i, e int) string   { return fmt.Sprintf("10.%d.%d.%d", 128+i>>8, i&255, e+1) }

func (o *objects) createService(ctx context.Context, i int) error {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespaceOf(i), Name: nameOf(i)},
		Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP}}},
	}
	_, err := o.client.CoreV1().Services(s.Namespace).Create(ctx, s, metav1.CreateOptions{})
	return err
}

func (o *objects) createSlice(ctx context.Context, i int) error {
	_, err := o.client.DiscoveryV1().EndpointSlices(namespaceOf(i)).Create(ctx, o.slice(i), metav1.CreateOptions{})
	return err
}

func (o *objects) slice(i int) *discoveryv1.EndpointSlice {
	name, port, proto, ready := "http", int32(8080), corev1.ProtocolTCP, true
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespaceOf(i), Name: nameOf(i) + "-a",
			Labels: map[string]string{discoveryv1.LabelServiceName: nameOf(i)}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &proto}},
	}
	for e := range o.Endpoints {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{addrOf(i, e)}, Conditions: discoveryv1.EndpointConditions{Ready: &ready},
		})
	}
	return s
}

// moveEndpoint moves one endpoint of the Service in the middle, each time to
// another address.
func (o *objects) moveEndpoint(ctx context.Context) error {
	s := o.slice(o.Services / 2)
	s.Endpoints[3].Addresses = []string{addrOf(o.Services/2, 200+o.moves%50)}
	o.moves++
	_, err := o.client.DiscoveryV1().EndpointSlices(s.Namespace).Update(ctx, s, metav1.UpdateOptions{})
	return err
}

// spareService creates or deletes one Service more.
func (o *objects) spareService(ctx context.Context, there bool) error {
	if there {
		return o.createService(ctx, o.Services)
	}
	return o.client.CoreV1().Services(namespaceOf(o.Services)).Delete(ctx, nameOf(o.Services), metav1.DeleteOptions{})
}

// spareEndpoints creates or deletes the endpoints of that Service, so that it
// appears with all of them at once.
func (o *objects) spareEndpoints(ctx context.Context, there bool) error {
	if there {
		return o.createSlice(ctx, o.Services)
	}
	return o.client.DiscoveryV1().EndpointSlices(namespaceOf(o.Services)).Delete(ctx, nameOf(o.Services)+"-a", metav1.DeleteOptions{})
}

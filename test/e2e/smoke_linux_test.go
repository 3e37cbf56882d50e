//go:build e2e

package e2e

import (
	"context"
	"net"
	"testing"

	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/kptrace/kptrace/internal/controlplane"
	"github.com/kptrace/kptrace/internal/netns"
)

// TestControlPlane: what later tests rely on. Objects come back as they were
// written, with what the API server allocates; roles hold; another namespace
// reaches the server; and a restart loses nothing.
func TestControlPlane(t *testing.T) {
	t.Parallel()
	c := start(t, controlplane.Config{ServiceRange: "10.96.0.0/16,fd00:96::/112", RBAC: true})
	o := fixture()
	o.create(t, c.client)

	if v, err := c.client.Discovery().ServerVersion(); err != nil || v.GitVersion[:5] != "v1.36" {
		t.Errorf("server version %v, %v; want v1.36", v, err)
	}
	services, err := c.client.CoreV1().Services(namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil || len(services.Items) != len(o.services) {
		t.Fatalf("%d Services, %v; want the %d written", len(services.Items), err, len(o.services))
	}
	for _, s := range services.Items {
		if s.Spec.Type != "ExternalName" && s.Spec.ClusterIP == "" {
			t.Errorf("Service %s has no cluster IP", s.Name)
		}
		for _, p := range s.Spec.Ports {
			if (s.Spec.Type == "NodePort") != (p.NodePort != 0) && s.Spec.Type != "LoadBalancer" {
				t.Errorf("Service %s of type %s has node port %d", s.Name, s.Spec.Type, p.NodePort)
			}
		}
	}
	slices, err := c.client.DiscoveryV1().EndpointSlices(namespace).List(t.Context(), metav1.ListOptions{})
	if err != nil || len(slices.Items) != len(o.slices) {
		t.Errorf("%d EndpointSlices, %v; want the %d written", len(slices.Items), err, len(o.slices))
	}

	// A kube-proxy's role reads Services and writes none, from anywhere.
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	stop, err := c.Forward(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	cfg := config(t, c.Kubeconfig(controlplane.KubeProxy))
	cfg.Dial = func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		err = ns.Do(func() error {
			conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
			return err
		})
		return conn, err
	}
	proxy, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := proxy.CoreV1().Services("").List(t.Context(), metav1.ListOptions{}); err != nil {
		t.Errorf("a kube-proxy lists Services: %v", err)
	}
	err = proxy.CoreV1().Services(namespace).Delete(t.Context(), "clusterip", metav1.DeleteOptions{})
	if !apierrors.IsForbidden(err) {
		t.Errorf("a kube-proxy deletes a Service: %v, want Forbidden", err)
	}

	if err := c.StopAPI(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.client.CoreV1().Services(namespace).List(t.Context(), metav1.ListOptions{}); err == nil {
		t.Error("a stopped API server answers")
	}
	if err := c.StartAPI(t.Context()); err != nil {
		t.Fatal(err)
	}
	var again *discoveryv1.EndpointSliceList
	eventually(t, "the same objects after a restart", func() (err error) {
		again, err = c.client.DiscoveryV1().EndpointSlices(namespace).List(t.Context(), metav1.ListOptions{})
		return err
	})
	if len(again.Items) != len(slices.Items) {
		t.Errorf("%d EndpointSlices after a restart, %d before", len(again.Items), len(slices.Items))
	}
}

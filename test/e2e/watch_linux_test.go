//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/kptrace/kptrace/internal/controlplane"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/kube"
	"github.com/kptrace/kptrace/proxy/kube/apiserver"
)

// watcher is our watcher at work, with what it emitted and logged.
type watcher struct {
	*apiserver.Watcher
	snaps chan *proxy.Snapshot

	mu  sync.Mutex
	log strings.Builder
}

func (w *watcher) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(p)
}

func (w *watcher) said(part string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Count(w.log.String(), part)
}

func watch(t *testing.T, c *cluster) *watcher {
	t.Helper()
	w := &watcher{snaps: make(chan *proxy.Snapshot, 1000)}
	var err error
	w.Watcher, err = apiserver.New(apiserver.Config{
		Kubeconfig: c.Kubeconfig(controlplane.KubeProxy), NodeName: nodeName, Logger: slog.New(slog.NewTextHandler(w, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx, func(s *proxy.Snapshot) { w.snaps <- s }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the watcher said:\n%s", w.log.String())
		}
	})
	return w
}

// next waits for a Snapshot of which ok holds.
func (w *watcher) next(t *testing.T, what string, ok func(*proxy.Snapshot) bool) *proxy.Snapshot {
	t.Helper()
	deadline := time.After(45 * time.Second)
	for {
		select {
		case s := <-w.snaps:
			if ok(s) {
				return s
			}
		case <-deadline:
			t.Fatalf("no Snapshot with %s; notes: %q", what, w.Notes())
		}
	}
}

func (w *watcher) none(t *testing.T, what string, d time.Duration) {
	t.Helper()
	select {
	case s := <-w.snaps:
		t.Fatalf("a Snapshot %s: %d Services, problems %v", what, len(s.Services), s.Problems)
	case <-time.After(d):
	}
}

// TestWatch follows a dual-stack cluster with the rights of a kube-proxy: all
// objects arrive, the API server goes and comes back without a Snapshot, what
// changes arrives soon, and pods have names once they may be seen.
func TestWatch(t *testing.T) {
	t.Parallel()
	c := start(t, controlplane.Config{ServiceRange: "10.96.0.0/16,fd00:96::/112", RBAC: true})
	o := fixture()
	o.create(t, c.client)
	w := watch(t, c)
	first := w.next(t, "everything", func(*proxy.Snapshot) bool { return true })
	w.compare(t, c, first)
	if len(first.ServiceCIDRs) != 2 {
		eventually(t, "ranges of Services", func() error {
			first = w.next(t, "ranges of Services", func(*proxy.Snapshot) bool { return true })
			if len(first.ServiceCIDRs) != 2 {
				return fmt.Errorf("%v", first.ServiceCIDRs)
			}
			return nil
		})
	}
	eventually(t, "the note on pods, and no other", func() error {
		if n := w.Notes(); len(n) != 1 || !strings.Contains(n[0], "grant list and watch on pods") {
			return fmt.Errorf("notes %q", n)
		}
		return nil
	})

	// What a Service is annotated with, and a node's heartbeat, are nothing to
	// program.
	svc := patch(t, c, "clusterip", func(s *corev1.Service) { s.Annotations = map[string]string{"a": "b"} })
	node, err := c.client.CoreV1().Nodes().Get(t.Context(), nodeName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, LastHeartbeatTime: metav1.Now()}}
	if _, err := c.client.CoreV1().Nodes().UpdateStatus(t.Context(), node, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	w.none(t, "of an annotation or a heartbeat", time.Second)

	// The API server goes and comes back.
	for range 2 {
		if err := c.StopAPI(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "a note on the outage", func() error {
			for _, n := range w.Notes() {
				if strings.Contains(n, "unreachable since") {
					return nil
				}
			}
			return fmt.Errorf("notes %q", w.Notes())
		})
		if err := c.StartAPI(t.Context()); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the end of the outage", func() error {
			if n := w.Notes(); len(n) != 1 {
				return fmt.Errorf("notes %q", n)
			}
			return nil
		})
	}
	w.none(t, "although nothing changed", 2*time.Second)
	if down, up := w.said("unreachable"), w.said("answers again"); down != 2 || up != 2 {
		t.Errorf("the log says %d times that the API server is unreachable and %d times that it answers again, want 2 and 2", down, up)
	}

	// Changes arrive.
	began := time.Now()
	patch(t, c, "clusterip", func(s *corev1.Service) { s.Spec.Ports[0].Port = 81 })
	w.next(t, "another port", func(s *proxy.Snapshot) bool {
		i := slices.IndexFunc(s.Services, func(s proxy.Service) bool { return s.Name.Name == "clusterip" })
		return s.Services[i].Port == 81
	})
	t.Logf("a change of a Service arrives after %v", time.Since(began).Round(time.Millisecond))
	ips := c.endpoint(t, "clusterip-ipv4", func(e *discoveryv1.Endpoint) { e.Conditions.Ready = ptr(false) })
	w.next(t, "an endpoint that is not ready", func(s *proxy.Snapshot) bool {
		for i := range s.Services {
			for _, ep := range s.Services[i].Endpoints {
				if s.Services[i].Name.Name == "clusterip" && ep.Addr.Addr().String() == ips[0] {
					return !ep.Ready
				}
			}
		}
		return false
	})
	if err := c.client.CoreV1().Services(namespace).Delete(t.Context(), svc.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	last := w.next(t, "a Service less", func(s *proxy.Snapshot) bool {
		return !slices.ContainsFunc(s.Services, func(s proxy.Service) bool { return s.Name.Name == "clusterip" })
	})
	w.compare(t, c, last)

	// Whoever may see pods sees their names.
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "client", Labels: map[string]string{"pod-template-hash": "abc"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "shell-abc", UID: "1", Controller: ptr(true)}}},
		Spec: corev1.PodSpec{NodeName: "node2", Containers: []corev1.Container{{Name: "c", Image: "none"}},
			AutomountServiceAccountToken: ptr(false)},
	}
	if pod, err = c.client.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	pod.Status.Phase, pod.Status.PodIPs = corev1.PodRunning, []corev1.PodIP{{IP: "10.244.2.99"}, {IP: "fd00:244:0:2::99"}}
	pod.Status.PodIP = pod.Status.PodIPs[0].IP
	if _, err := c.client.CoreV1().Pods(namespace).UpdateStatus(t.Context(), pod, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	grantPods(t, c)
	named := w.next(t, "names of pods", func(s *proxy.Snapshot) bool { return len(s.Pods) > len(last.Pods) })
	for ip, p := range named.Pods {
		if s := ip.String(); s != "10.244.2.99" && s != "fd00:244:0:2::99" {
			continue
		}
		if want := (proxy.Pod{Namespace: namespace, Name: "client", Node: "node2", Workload: "Deployment/shell"}); p != want {
			t.Errorf("%s is %+v, want %+v", ip, p, want)
		}
	}
	if len(named.Pods) != len(last.Pods)+2 {
		t.Errorf("%d names, want those of both addresses of one pod beside the %d before", len(named.Pods), len(last.Pods))
	}
	if n := w.Notes(); len(n) != 0 {
		t.Errorf("notes %q, want none", n)
	}
}

// compare holds a Snapshot against what the API server says all at once.
func (w *watcher) compare(t *testing.T, c *cluster, got *proxy.Snapshot) {
	t.Helper()
	services, err := c.client.CoreV1().Services("").List(t.Context(), metav1.ListOptions{LabelSelector: "!service.kubernetes.io/service-proxy-name"})
	if err != nil {
		t.Fatal(err)
	}
	all, err := c.client.DiscoveryV1().EndpointSlices("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for _, s := range services.Items {
		known[s.Namespace+"/"+s.Name] = true
	}
	all.Items = slices.DeleteFunc(all.Items, func(s discoveryv1.EndpointSlice) bool { return !known[kube.ServiceOf(&s)] })
	node, err := c.client.CoreV1().Nodes().Get(t.Context(), nodeName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	want := kube.Convert(&kube.Objects{Services: services.Items, Slices: all.Items, Nodes: []corev1.Node{*node}}, nodeName)
	options := cmp.Options{
		cmpopts.EquateComparable(), cmpopts.EquateEmpty(), cmpopts.IgnoreFields(proxy.Snapshot{}, "ServiceCIDRs"),
		cmp.Comparer(func(a, b interface{ String() string }) bool { return a.String() == b.String() }),
	}
	if diff := cmp.Diff(want, got, options); diff != "" {
		t.Errorf("Snapshot (-what the API server says +what was emitted):\n%s", diff)
	}
	if len(want.Services) < 50 {
		t.Errorf("only %d Service ports compared", len(want.Services))
	}
	if len(got.Problems) > 0 {
		t.Errorf("problems: %v", got.Problems)
	}
}

// patch changes a Service.
func patch(t *testing.T, c *cluster, name string, change func(*corev1.Service)) *corev1.Service {
	t.Helper()
	s, err := c.client.CoreV1().Services(namespace).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	change(s)
	if s, err = c.client.CoreV1().Services(namespace).Update(t.Context(), s, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	return s
}

// endpoint changes the first endpoint of a slice and returns its addresses.
func (c *cluster) endpoint(t *testing.T, slice string, change func(*discoveryv1.Endpoint)) []string {
	t.Helper()
	s, err := c.client.DiscoveryV1().EndpointSlices(namespace).Get(t.Context(), slice, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	change(&s.Endpoints[0])
	if s, err = c.client.DiscoveryV1().EndpointSlices(namespace).Update(t.Context(), s, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	return s.Endpoints[0].Addresses
}

// grantPods lets a kube-proxy see pods, as docs/api-server.md has it.
func grantPods(t *testing.T, c *cluster) {
	t.Helper()
	role := &rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: "kptrace-names"},
		Rules:      []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"list", "watch"}}},
	}
	if _, err := c.client.RbacV1().ClusterRoles().Create(t.Context(), role, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: role.Name},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role.Name},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: string(controlplane.KubeProxy)}},
	}
	if _, err := c.client.RbacV1().ClusterRoleBindings().Create(t.Context(), binding, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

package apiserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/rest"
	clienttesting "k8s.io/client-go/testing"

	"github.com/kptrace/kptrace/proxy"
)

// server is client-go's fake API server, with faults.
type server struct {
	*fake.Clientset
	mu      sync.Mutex
	faults  map[string]error // by resource, "*" for all
	watches []watch.Interface
	open    map[string]int
}

func newServer(objects ...runtime.Object) *server {
	s := &server{Clientset: fake.NewClientset(objects...), faults: map[string]error{}, open: map[string]int{}}
	fault := func(resource string) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if err := s.faults[resource]; err != nil {
			return err
		}
		return s.faults["*"]
	}
	s.PrependReactor("list", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		err := fault(a.GetResource().Resource)
		return err != nil, nil, err
	})
	s.PrependWatchReactor("*", func(a clienttesting.Action) (bool, watch.Interface, error) {
		resource := a.GetResource()
		if err := fault(resource.Resource); err != nil {
			return true, nil, err
		}
		w, err := s.Tracker().Watch(resource, a.GetNamespace())
		s.mu.Lock()
		defer s.mu.Unlock()
		s.watches = append(s.watches, w)
		s.open[resource.Resource]++
		return true, w, err
	})
	return s
}

func (s *server) fault(resource string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults[resource] = err
}

// drop ends all watches, as a server that goes away does.
func (s *server) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.watches {
		w.Stop()
	}
	s.watches = nil
	clear(s.open)
}

func forbidden(resource string) error {
	return apierrors.NewForbidden(schema.GroupResource{Resource: resource}, "", errors.New("no rule allows it"))
}

// lines collects a log.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) count(part string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), part)
}

// run is a Watcher that runs until the test ends.
type run struct {
	*Watcher
	log   lines
	snaps chan *proxy.Snapshot
}

func start(t *testing.T, s *server, change func(*Config)) *run {
	t.Helper()
	r := &run{snaps: make(chan *proxy.Snapshot, 1000)}
	cfg := Config{NodeName: "node1", client: s, retry: 20 * time.Millisecond,
		Logger: slog.New(slog.NewTextHandler(&r.log, nil))}
	if change != nil {
		change(&cfg)
	}
	var err error
	if r.Watcher, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx, func(s *proxy.Snapshot) { r.snaps <- s }) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Run does not end with its context")
		}
	})
	return r
}

// next waits for a Snapshot of which ok holds.
func (r *run) next(t *testing.T, what string, ok func(*proxy.Snapshot) bool) *proxy.Snapshot {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		select {
		case s := <-r.snaps:
			if ok(s) {
				return s
			}
		case <-deadline:
			t.Fatalf("no Snapshot with %s within 10 s", what)
		}
	}
}

// none fails if there is a Snapshot in the time given.
func (r *run) none(t *testing.T, what string, d time.Duration) {
	t.Helper()
	select {
	case s := <-r.snaps:
		t.Fatalf("a Snapshot %s: %+v", what, s)
	case <-time.After(d):
	}
}

// rest waits until names have settled, and forgets what came until then.
func (r *run) rest() {
	time.Sleep(nameSettle + 200*time.Millisecond)
	for len(r.snaps) > 0 {
		<-r.snaps
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 10 s", what)
		}
	}
}

// watching waits until changes of these resources are seen: what happens
// between the fake server's list and its watch is lost.
func (s *server) watching(t *testing.T, resources ...string) {
	t.Helper()
	for _, r := range resources {
		eventually(t, "watching "+r, func() bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.open[r] > 0
		})
	}
}

var ctx = context.Background()

// TestFirst holds back EndpointSlices: nothing is emitted before they are
// known, and what comes first is complete.
func TestFirst(t *testing.T) {
	t.Parallel()
	s := newServer(testService(1), testSlice(1, 0, 3, true), testNode("node1", "192.168.7.1"))
	s.fault("endpointslices", errors.New("etcdserver: no leader"))
	r := start(t, s, nil)
	r.none(t, "before EndpointSlices are known", 300*time.Millisecond)
	if n := r.log.count("unreachable; nothing is programmed before it answers"); n != 1 {
		t.Errorf("the log says so %d times, want once", n)
	}
	s.fault("endpointslices", nil)
	snap := r.next(t, "anything", func(*proxy.Snapshot) bool { return true })
	if len(snap.Services) != 1 || len(snap.Services[0].Endpoints) != 3 || snap.Node.Zone != "a" || len(snap.Problems) > 0 {
		t.Errorf("first Snapshot is not complete: %+v", snap)
	}
}

// TestNodeWait starts before the Node exists.
func TestNodeWait(t *testing.T) {
	t.Parallel()
	s := newServer(testService(1))
	began := time.Now()
	r := start(t, s, func(c *Config) { c.NodeWait = 300 * time.Millisecond })
	snap := r.next(t, "no Node", func(*proxy.Snapshot) bool { return true })
	if took := time.Since(began); took < 300*time.Millisecond {
		t.Errorf("waited %v, want 300 ms", took)
	}
	if len(snap.Problems) != 1 || snap.Problems[0].Object != "Node node1" {
		t.Errorf("problems %v, want one of Node node1", snap.Problems)
	}
	s.watching(t, "nodes")
	if err := s.Tracker().Add(testNode("node2", "192.168.7.2")); err != nil {
		t.Fatal(err)
	}
	if err := s.Tracker().Add(testNode("node1", "192.168.7.1")); err != nil {
		t.Fatal(err)
	}
	snap = r.next(t, "a Node", func(s *proxy.Snapshot) bool { return s.Node.Zone == "a" })
	if len(snap.Problems) != 0 || snap.Node.Addrs[0].String() != "192.168.7.1" {
		t.Errorf("Node %+v, problems %v", snap.Node, snap.Problems)
	}
	if err := s.CoreV1().Nodes().Delete(ctx, "node1", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	r.next(t, "no Node again", func(s *proxy.Snapshot) bool { return len(s.Problems) == 1 })
}

// TestNames takes the right to see Pods away: slices name what they can, and
// the notes say what is missing until it is granted.
func TestNames(t *testing.T) {
	t.Parallel()
	named := testSlice(1, 0, 1, true)
	named.Endpoints[0].TargetRef.UID = "of-the-slice"
	s := newServer(testService(1), named, testNode("node1", "192.168.7.1"), testNode("node2", "192.168.7.2"),
		testPod("client", "10.244.2.9"), testPod("pod-10", "10.100.0.10"))
	s.fault("pods", forbidden("pods"))
	s.fault("servicecidrs", apierrors.NewNotFound(schema.GroupResource{Resource: "servicecidrs"}, ""))
	r := start(t, s, nil)
	snap := r.next(t, "anything", func(*proxy.Snapshot) bool { return true })
	ep := snap.Services[0].Endpoints[0]
	if ep.Pod != "pod-10" || snap.Pods[ep.Addr.Addr()] != (proxy.Pod{Namespace: "shop", Name: "pod-10", Node: "node1"}) {
		t.Errorf("endpoint %+v is %+v, want the slice's name", ep, snap.Pods[ep.Addr.Addr()])
	}
	for name, want := range map[string]types.UID{"pod-10": "of-the-slice", "client": ""} {
		if got := r.UID(proxy.ObjectRef{Kind: "Pod", Namespace: "shop", Name: name}); got != want {
			t.Errorf("UID of pod %s: %q, want %q", name, got, want)
		}
	}
	eventually(t, "a note on pods", func() bool { return len(r.Notes()) == 1 })
	if n := r.Notes()[0]; !strings.Contains(n, "EndpointSlices") || !strings.Contains(n, "list and watch on pods") {
		t.Errorf("note %q", n)
	}
	if n := r.log.count("doing without"); n != 1 {
		t.Errorf("%d lines say so, want 1", n)
	}
	s.fault("pods", nil)
	snap = r.next(t, "all names", func(s *proxy.Snapshot) bool { return len(s.Pods) == 2 && len(s.Nodes) == 2 })
	for ip, pod := range snap.Pods {
		if pod.Workload != "Deployment/web" || pod.Node != "node2" {
			t.Errorf("%s is %+v", ip, pod)
		}
	}
	if notes := r.Notes(); len(notes) != 0 {
		t.Errorf("notes %q, want none", notes)
	}
}

// TestOutage takes the API server away and brings it back: the log says each
// once, and Snapshots come only of what is different.
func TestOutage(t *testing.T) {
	t.Parallel()
	s := newServer(testService(1), testService(2), testSlice(1, 0, 3, true), testNode("node1", "192.168.7.1"), testPod("client", "10.244.2.9"))
	r := start(t, s, nil)
	r.next(t, "names", func(s *proxy.Snapshot) bool { return len(s.Pods) == 4 })
	all := []string{"services", "endpointslices", "nodes", "pods", "servicecidrs"}
	s.watching(t, all...)
	r.rest()
	for outage := 1; outage <= 2; outage++ {
		s.fault("*", errors.New("connection refused"))
		s.drop()
		eventually(t, "a note", func() bool {
			n := r.Notes()
			return len(n) == 1 && strings.Contains(n[0], "unreachable since") && strings.Contains(n[0], "connection refused")
		})
		r.none(t, "of an outage", 300*time.Millisecond)
		s.fault("*", nil)
		eventually(t, "no note", func() bool { return len(r.Notes()) == 0 })
		s.watching(t, all...)
		r.none(t, "although nothing changed", 300*time.Millisecond)
		if down, up := r.log.count("unreachable"), r.log.count("answers again"); down != outage || up != outage {
			t.Errorf("after %d outages the log says %d times that it is down and %d times that it is back", outage, down, up)
		}
	}
	if err := s.CoreV1().Services("shop").Delete(ctx, "svc-2", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	r.next(t, "one Service", func(s *proxy.Snapshot) bool { return len(s.Services) == 1 })

	// What is deleted meanwhile is found missing.
	s.fault("*", errors.New("connection refused"))
	s.drop()
	eventually(t, "a note", func() bool { return len(r.Notes()) > 0 })
	if err := s.Tracker().Delete(schema.GroupVersionResource{Version: "v1", Resource: "services"}, "shop", "svc-1"); err != nil {
		t.Fatal(err)
	}
	s.fault("*", nil)
	r.next(t, "no Service", func(s *proxy.Snapshot) bool { return len(s.Services) == 0 })
	r.none(t, "after the last", 200*time.Millisecond)
}

// TestRefused takes away the right to see Services, once and in the end.
func TestRefused(t *testing.T) {
	t.Parallel()
	s := newServer(testService(1), testNode("node1", "192.168.7.1"))
	s.fault("services", apierrors.NewUnauthorized("token expired"))
	r := start(t, s, nil)
	eventually(t, "a note", func() bool { return len(r.Notes()) == 1 })
	time.Sleep(100 * time.Millisecond)
	if n := r.log.count("level=ERROR"); n != 1 {
		t.Errorf("%d errors in the log, want 1", n)
	}
	s.fault("services", nil)
	r.next(t, "a Service", func(s *proxy.Snapshot) bool { return len(s.Services) == 1 })
	if len(r.Notes()) != 0 || r.log.count("access is granted") != 1 {
		t.Errorf("notes %q", r.Notes())
	}
}

// TestStarting has an API server refuse everything for a moment, as it does
// before it has read its rules: that is no lost right. One that is refused for
// longer is.
func TestStarting(t *testing.T) {
	t.Parallel()
	s := newServer(testService(1), testNode("node1", "192.168.7.1"))
	r := start(t, s, nil)
	r.next(t, "a Service", func(s *proxy.Snapshot) bool { return len(s.Services) == 1 })
	all := []string{"services", "endpointslices", "nodes", "pods", "servicecidrs"}
	s.watching(t, all...)
	s.fault("*", errors.New("connection refused"))
	s.drop()
	unreachable := func() bool {
		n := r.Notes()
		return len(n) == 1 && strings.Contains(n[0], "unreachable since")
	}
	eventually(t, "a note", unreachable)
	s.fault("*", forbidden("anything"))
	time.Sleep(200 * time.Millisecond)
	if n := r.Notes(); !unreachable() {
		t.Errorf("notes %q, want one of an outage", n)
	}
	s.fault("*", nil)
	eventually(t, "no note", func() bool { return len(r.Notes()) == 0 })
	if n := r.log.count("refused;") + r.log.count("granted"); n != 0 {
		t.Errorf("%d lines speak of rights", n)
	}
	s.watching(t, all...)
	r.health.mu.Lock()
	r.health.grace = 100 * time.Millisecond
	r.health.mu.Unlock()
	s.fault("services", forbidden("services"))
	s.drop()
	eventually(t, "a note on services", func() bool {
		n := r.Notes()
		return len(n) == 1 && strings.Contains(n[0], "refuses access to services")
	})
}

// TestUnchanged changes what nobody proxies by: no Snapshot comes of it.
func TestUnchanged(t *testing.T) {
	t.Parallel()
	s := newServer(testService(1), testSlice(1, 0, 3, true), testNode("node1", "192.168.7.1"), testPod("client", "10.244.2.9"))
	r := start(t, s, nil)
	r.next(t, "names", func(s *proxy.Snapshot) bool { return len(s.Pods) == 4 })
	s.watching(t, "services", "endpointslices", "nodes", "pods")
	r.rest()
	svc, node, pod, slice := testService(1), testNode("node1", "192.168.7.1"), testPod("client", "10.244.2.9"), testSlice(1, 0, 3, true)
	svc.Spec.Selector = map[string]string{"app": "foo"}
	node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady}}
	pod.Status.Message = "still there"
	slice.Annotations = map[string]string{"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z"}
	_, err1 := s.CoreV1().Services("shop").Update(ctx, svc, metav1.UpdateOptions{})
	_, err2 := s.CoreV1().Nodes().Update(ctx, node, metav1.UpdateOptions{})
	_, err3 := s.CoreV1().Pods("shop").Update(ctx, pod, metav1.UpdateOptions{})
	_, err4 := s.DiscoveryV1().EndpointSlices("shop").Update(ctx, slice, metav1.UpdateOptions{})
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		t.Fatal(err)
	}
	r.none(t, "although nothing to program changed", 1300*time.Millisecond)
}

// TestChurn changes things faster than they settle: a burst is one Snapshot,
// and changes that go on are shown meanwhile.
func TestChurn(t *testing.T) {
	t.Parallel()
	s := newServer(testService(0), testNode("node1", "192.168.7.1"))
	r := start(t, s, func(c *Config) { c.Settle = 50 * time.Millisecond })
	r.next(t, "anything", func(*proxy.Snapshot) bool { return true })
	s.watching(t, "services", "endpointslices")
	for i := 1; i <= 100; i++ {
		if _, err := s.CoreV1().Services("shop").Create(ctx, testService(i), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	seen := 0
	r.next(t, "all Services", func(s *proxy.Snapshot) bool { seen++; return len(s.Services) == 101 })
	if seen > 5 {
		t.Errorf("a burst of 100 Services is %d Snapshots", seen)
	}
	began, n := time.Now(), 0
	for time.Since(began) < 2*time.Second {
		n++
		slice := testSlice(n%100, 0, 1, true)
		slice.Name = fmt.Sprintf("extra-%d", n)
		if _, err := s.DiscoveryV1().EndpointSlices("shop").Create(ctx, slice, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	if got := len(r.snaps); got < 2 || got > 8 {
		t.Errorf("%d changes in 2 s are %d Snapshots, want about 4", n, got)
	}
}

// TestLoad takes one Snapshot.
func TestLoad(t *testing.T) {
	t.Parallel()
	s := newServer(testService(1), testSlice(1, 0, 3, true), testNode("node1", "192.168.7.1"))
	w, err := New(Config{NodeName: "node1", client: s})
	if err != nil {
		t.Fatal(err)
	}
	snap, err := w.Load(ctx)
	if err != nil || len(snap.Services) != 1 {
		t.Errorf("%+v, %v", snap, err)
	}

	// Names are waited for, but not where they may not be seen.
	for _, denied := range []error{nil, forbidden("pods")} {
		s := newServer(testService(1), testSlice(1, 0, 3, true), testNode("node1", "192.168.7.1"), testPod("web", "10.1.0.9"))
		s.fault("pods", denied)
		if w, err = New(Config{NodeName: "node1", client: s}); err != nil {
			t.Fatal(err)
		}
		snap, err := w.Load(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if named := snap.Pods[netip.MustParseAddr("10.1.0.9")].Name == "web"; named != (denied == nil) {
			t.Errorf("pods refused: %v: %+v", denied, snap.Pods)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	if w, err = New(Config{NodeName: "node1", client: s}); err != nil {
		t.Fatal(err)
	}
	if snap, err = w.Load(ctx); snap != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("%+v, %v, want an error", snap, err)
	}
}

const kubeconfig = `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://192.0.2.1:6443"}}]
users: [{name: u, user: {token: secret}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`

// TestConfig reads how to reach an API server.
func TestConfig(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, err := New(Config{}); !errors.Is(err, ErrNoConfig) {
		t.Errorf("without anything: %v", err)
	}
	file := filepath.Join(t.TempDir(), "config")
	if _, err := New(Config{Kubeconfig: file}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	if err := os.WriteFile(file, []byte(kubeconfig), 0o600); err != nil {
		t.Fatal(err)
	}
	w, err := New(Config{Kubeconfig: file})
	if err != nil || w.Source() != "api server https://192.0.2.1:6443" {
		t.Errorf("%q, %v", w.Source(), err)
	}
	if w, err = New(Config{Kubeconfig: file, Master: "https://192.0.2.2:6443"}); err != nil || w.Source() != "api server https://192.0.2.2:6443" {
		t.Errorf("%q, %v", w.Source(), err)
	}
	check := func(c Config, qps float32, burst int, accept string) {
		t.Helper()
		c.Kubeconfig = file
		rc, err := c.RESTConfig()
		if err != nil || rc.QPS != qps || rc.Burst != burst || rc.AcceptContentTypes != accept || rc.BearerToken != "secret" {
			t.Errorf("%+v, %v", rc, err)
		}
		if _, err := rest.HTTPClientFor(rc); err != nil {
			t.Error(err)
		}
	}
	check(Config{}, 5, 10, "application/vnd.kubernetes.protobuf,application/json")
	check(Config{QPS: 50, Burst: 100, ContentType: "application/json"}, 50, 100, "application/json")
}

// TestJudge says what answers mean.
func TestJudge(t *testing.T) {
	t.Parallel()
	tooLarge := apierrors.NewTimeoutError("Too large resource version", 1)
	tooLarge.ErrStatus.Details.Causes = []metav1.StatusCause{{Type: metav1.CauseTypeResourceVersionTooLarge}}
	tests := []struct {
		verb string
		err  error
		want condition
	}{
		{"list", nil, fine},
		{"list", forbidden("pods"), refused},
		{"watch", apierrors.NewResourceExpired("too old"), unknown},
		{"list", tooLarge, unknown},
		{"watch", apierrors.NewBadRequest("sendInitialEvents"), unknown},
		{"list", apierrors.NewBadRequest("selector"), failing},
		{"list", apierrors.NewInternalError(errors.New("etcd")), failing},
		{"list", apierrors.NewGenericServerResponse(http.StatusServiceUnavailable, "list", schema.GroupResource{}, "", "", 0, true), failing},
		{"watch", errors.New("dial tcp: connection refused"), failing},
		{"list", apierrors.NewNotFound(schema.GroupResource{Resource: "servicecidrs"}, ""), absent},
	}
	for _, tt := range tests {
		if got := judge(tt.verb, tt.err); got != tt.want {
			t.Errorf("%s: %v is %d, want %d", tt.verb, tt.err, got, tt.want)
		}
	}
}

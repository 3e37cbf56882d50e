package manifests

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

const good = `
apiVersion: v1
kind: Node
metadata: {name: node1, labels: {topology.kubernetes.io/zone: a}}
spec: {podCIDR: 10.244.1.0/24}
status: {addresses: [{type: InternalIP, address: 192.168.7.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop}
spec: {nodeName: node1, containers: []}
status: {podIP: 10.244.1.5}
---
apiVersion: v1
kind: Service
metadata: {name: foo, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  ports: [{name: http, port: 80}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: foo-1, namespace: shop, labels: {kubernetes.io/service-name: foo}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.244.1.7], nodeName: node1, targetRef: {kind: Pod, name: foo-a}}
- {addresses: [10.244.2.8], nodeName: node2, conditions: {ready: false}}
`

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a.yaml", good)
	s, err := New(Config{Dir: dir, Node: "node1"}).Load()
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Problems) > 0 {
		t.Fatalf("problems in a good folder: %v", s.Problems)
	}
	svc, ok := s.Service(proxy.PortName{Namespace: "shop", Name: "foo", Port: "http", Proto: conntrack.TCP})
	if !ok || len(svc.Endpoints) != 2 {
		t.Fatalf("shop/foo:http = %+v, %v", svc, ok)
	}
	a, b := svc.Endpoints[0], svc.Endpoints[1]
	if a.Addr.String() != "10.244.1.7:8080" || !a.Ready || !a.Local || a.Pod != "foo-a" || a.Namespace != "shop" {
		t.Errorf("first endpoint = %+v", a)
	}
	if b.Ready || b.Local || b.Node != "node2" {
		t.Errorf("second endpoint = %+v", b)
	}
	if s.Node.Zone != "a" || s.Node.PodCIDRs[0].String() != "10.244.1.0/24" {
		t.Errorf("node = %+v", s.Node)
	}
}

// TestBad breaks one object at a time: the problem names file, object and
// field, and shop/foo stays as it was.
func TestBad(t *testing.T) {
	tests := []struct {
		name, text         string
		object, field, msg string
	}{
		{"no port", svc("bad", "clusterIP: 10.96.0.11"), "Service shop/bad", "spec.ports", "at least one port"},
		{"port range", svc("bad", "clusterIP: 10.96.0.11\n  ports: [{port: 70000}]"), "Service shop/bad", "spec.ports[0].port", "70000"},
		{"protocol", svc("bad", "clusterIP: 10.96.0.11\n  ports: [{port: 80, protocol: ICMP}]"), "Service shop/bad", "spec.ports[0].protocol", "not TCP, UDP or SCTP"},
		{"cluster ip", svc("bad", "clusterIP: 10.96.0.300\n  ports: [{port: 80}]"), "Service shop/bad", "spec.clusterIP", "10.96.0.300"},
		{"no cluster ip", svc("bad", "ports: [{port: 80}]"), "Service shop/bad", "spec.clusterIP", "empty"},
		{"type", svc("bad", "clusterIP: 10.96.0.11\n  ports: [{port: eighty}]"), "Service shop/bad", "spec.ports.port", "cannot unmarshal"},
		{"unknown field", svc("bad", "clusterIP: 10.96.0.11\n  sesionAffinity: ClientIP\n  ports: [{port: 80}]"), "Service shop/bad", "spec.sesionAffinity", "unknown field"},
		{"same address", svc("bad", "clusterIP: 10.96.0.10\n  ports: [{port: 80}]"), "Service shop/bad", "spec.clusterIP", "already belongs to shop/foo:http"},
		{"affinity", svc("bad", "clusterIP: 10.96.0.11\n  sessionAffinity: Cookie\n  ports: [{port: 80}]"), "Service shop/bad", "spec.sessionAffinity", "Cookie"},
		{"twice", svc("foo", "clusterIP: 10.96.0.11\n  ports: [{port: 80}]"), "Service shop/foo", "metadata.name", "defined twice"},
		{"api version", "apiVersion: v1beta1\nkind: Service\nmetadata: {name: bad}\n", "Service bad", "apiVersion", `a Service of "v1beta1" is not read: v1 is`},
		{"yaml", "kind: [", "", "", "document 1"},
		{"endpoint without port", slice("bad", "foo", "ports: [{name: http}]\nendpoints: [{addresses: [10.244.1.9]}]"), "EndpointSlice shop/bad", "ports[0].port", "missing"},
		{"endpoint without address", slice("bad", "foo", "ports: [{name: http, port: 80}]\nendpoints: [{addresses: []}]"), "EndpointSlice shop/bad", "endpoints[0].addresses", "empty"},
		{"endpoint address", slice("bad", "foo", "ports: [{name: http, port: 80}]\nendpoints: [{addresses: [nope]}]"), "EndpointSlice shop/bad", "endpoints[0].addresses", "nope"},
		{"slice of nothing", slice("bad", "gone", "ports: [{port: 80}]\nendpoints: []"), "EndpointSlice shop/bad", "metadata.labels", "does not exist"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, "a.yaml", good)
			write(t, dir, "bad.yaml", tt.text)
			s, err := New(Config{Dir: dir, Node: "node1"}).Load()
			if err != nil {
				t.Fatal(err)
			}
			found := false
			for _, p := range s.Problems {
				found = found || p.File != "" && p.Object == tt.object && p.Field == tt.field && strings.Contains(p.Message, tt.msg)
			}
			if !found {
				t.Errorf("no problem with object %q, field %q, %q in %v", tt.object, tt.field, tt.msg, s.Problems)
			}
			foo, ok := s.Service(proxy.PortName{Namespace: "shop", Name: "foo", Port: "http", Proto: conntrack.TCP})
			if !ok || len(foo.Endpoints) != 2 {
				t.Errorf("shop/foo:http did not survive: %+v", foo)
			}
		})
	}
}

func TestDuplicateNodePort(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a", "b"} {
		ip := map[string]string{"a": "10.96.0.21", "b": "10.96.0.22"}[name]
		write(t, dir, name+".yaml", svc(name, "type: NodePort\n  clusterIP: "+ip+"\n  ports: [{port: 80, nodePort: 30080}]"))
	}
	s, err := New(Config{Dir: dir, Node: "node1"}).Load()
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Services) != 2 || s.Services[0].NodePort != 30080 || s.Services[1].NodePort != 0 {
		t.Fatalf("services = %+v", s.Services)
	}
	if len(s.Problems) != 1 || s.Problems[0].Object != "Service shop/b" || s.Problems[0].File != "b.yaml" {
		t.Fatalf("problems = %v", s.Problems)
	}
}

// TestWatch edits a file: a change arrives, a broken file keeps what it said
// last, and mending it recovers without a restart.
func TestWatch(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a.yaml", good)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	snaps := make(chan *proxy.Snapshot, 16)
	done := make(chan error, 1)
	go func() { done <- New(Config{Dir: dir, Node: "node1"}).Run(ctx, func(s *proxy.Snapshot) { snaps <- s }) }()
	next := func(what string, ok func(*proxy.Snapshot) bool) {
		t.Helper()
		deadline := time.After(5 * time.Second)
		for {
			select {
			case s := <-snaps:
				if ok(s) {
					return
				}
			case <-deadline:
				t.Fatalf("no snapshot with %s within 5 s", what)
			}
		}
	}
	next("two endpoints", func(s *proxy.Snapshot) bool { return len(s.Services[0].Endpoints) == 2 })
	write(t, dir, "a.yaml", strings.Replace(good, "conditions: {ready: false}", "conditions: {ready: true}", 1))
	next("a ready endpoint", func(s *proxy.Snapshot) bool { return s.Services[0].Endpoints[1].Ready })
	write(t, dir, "a.yaml", "kind: [")
	next("a problem and the last good contents", func(s *proxy.Snapshot) bool {
		return len(s.Problems) == 1 && s.Problems[0].File == "a.yaml" && len(s.Services) == 1 && s.Services[0].Endpoints[1].Ready
	})
	write(t, dir, "a.yaml", good)
	next("no problem", func(s *proxy.Snapshot) bool { return len(s.Problems) == 0 && !s.Services[0].Endpoints[1].Ready })
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestSkipped(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a.yaml", svc("h", "clusterIP: None\n  ports: [{port: 80}]")+"---\n"+
		svc("x", "type: ExternalName\n  externalName: example.org"))
	s, err := New(Config{Dir: dir}).Load()
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Skipped) != 2 || s.Skipped[0].Reason != "headless" || s.Skipped[1].Reason != "ExternalName" {
		t.Fatalf("skipped = %+v, problems %v", s.Skipped, s.Problems)
	}
}

func svc(name, spec string) string {
	return "apiVersion: v1\nkind: Service\nmetadata: {name: " + name + ", namespace: shop}\nspec:\n  " + spec + "\n"
}

func slice(name, service, rest string) string {
	return "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: " + name +
		", namespace: shop, labels: {kubernetes.io/service-name: " + service + "}}\naddressType: IPv4\n" + rest + "\n"
}

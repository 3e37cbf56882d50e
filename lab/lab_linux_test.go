package lab

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/kptrace/kptrace/internal/exec"
)

// twoNodes has a server and a client on different nodes, and one outside.
const twoNodes = `
apiVersion: v1
kind: Node
metadata: {name: node1}
spec: {podCIDR: 10.244.1.0/24}
status: {addresses: [{type: InternalIP, address: 172.18.0.11}]}
---
apiVersion: v1
kind: Node
metadata: {name: node2}
spec: {podCIDR: 10.244.2.0/24}
status: {addresses: [{type: InternalIP, address: 172.18.0.12}]}
---
apiVersion: v1
kind: Pod
metadata: {name: near, namespace: shop}
spec:
  nodeName: node1
  containers: [{name: s, image: kptrace/server, ports: [{name: http, containerPort: 8080}, {containerPort: 9000}, {containerPort: 53, protocol: UDP}]}]
status: {podIP: 10.244.1.2}
---
apiVersion: v1
kind: Pod
metadata: {name: far, namespace: shop}
spec:
  nodeName: node2
  containers: [{name: s, image: kptrace/server, ports: [{name: http, containerPort: 8080}]}]
status: {podIP: 10.244.2.2}
---
apiVersion: v1
kind: Pod
metadata:
  name: web
  namespace: shop
  annotations:
    kptrace.dev/traffic: |
      http://10.244.1.2:8080 rate=50 count=20
      tcp://10.244.1.2:9000 rate=50 count=20
      udp://10.244.1.2:53 rate=50 count=20
      http://10.244.2.2:8080 rate=50 count=20
      tcp://10.244.1.2:9999 rate=50 count=5
spec: {nodeName: node1, containers: [{name: c, image: kptrace/client}]}
status: {podIP: 10.244.1.10}
---
apiVersion: v1
kind: Pod
metadata:
  name: outside
  namespace: shop
  annotations: {kptrace.dev/external: "true", kptrace.dev/traffic: "tcp://node1:1 rate=20 count=3"}
spec: {containers: [{name: c, image: kptrace/client}]}
status: {podIP: 172.18.0.200}
---
apiVersion: v1
kind: Service
metadata: {name: foo, namespace: shop}
spec: {clusterIP: 10.96.0.10, ports: [{name: a, port: 80}, {name: b, port: 81}]}
`

func startLab(t *testing.T, manifests string, cfg Config) *Lab {
	t.Helper()
	cfg.Dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(cfg.Dir, "all.yaml"), []byte(manifests), 0o644); err != nil {
		t.Fatal(err)
	}
	if cfg.SocketDir == "" {
		cfg.SocketDir = t.TempDir()
	}
	cfg.NoProxy = true
	l, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	for _, p := range l.Problems() {
		t.Errorf("problem: %v", p.Error())
	}
	return l
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// Every pod reaches every other, by its own address, and clients report what
// happened to each connection, with pods routed to and on a bridge.
func TestTraffic(t *testing.T) {
	for _, opt := range []Options{{}, {Bridge: true}} {
		t.Run(fmt.Sprintf("bridge=%t", opt.Bridge), func(t *testing.T) { testTraffic(t, opt) })
	}
}

func testTraffic(t *testing.T, opt Options) {
	got := make(chan Report, 1000)
	l := startLab(t, twoNodes, Config{Options: opt, Report: func(r Report) { got <- r }})
	if err := l.Do(NodeSpace("node1"), func() error {
		_, err := netlink.LinkByName("cni0")
		if found := err == nil; found != opt.Bridge {
			return fmt.Errorf("cni0 is there: %t", found)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	ctx := within(t, 20*time.Second)
	if err := l.StartTraffic(ctx); err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for range 4*20 + 5 + 3 {
		var r Report
		select {
		case r = <-got:
		case <-ctx.Done():
			t.Fatalf("not all connections were reported: %v", seen)
		}
		seen[fmt.Sprintf("%s %s %s", r.URL, r.Server, r.Err)]++
		if !r.Local.IsValid() || r.Local.Port() == 0 || r.End.Before(r.Start) {
			t.Errorf("report without port or times: %+v", r)
		}
		if r.Server != "" && (r.Seen != r.Local || r.Established < 0 || r.Established > time.Second) {
			t.Errorf("answered, but: %+v", r)
		}
		if r.Err != "" && r.Established != -1 {
			t.Errorf("failed, but established: %+v", r)
		}
	}
	if err := l.StopTraffic(ctx); err != nil {
		t.Fatal(err)
	}
	for key, n := range map[string]int{
		"http://10.244.1.2:8080 shop/near ": 20,
		"tcp://10.244.1.2:9000 shop/near ":  20,
		"udp://10.244.1.2:53 shop/near ":    20,
		"http://10.244.2.2:8080 shop/far ":  20,
		"tcp://10.244.1.2:9999  refused":    5,
		"tcp://node1:1  refused":            3,
	} {
		if seen[key] != n {
			t.Errorf("%q: %d connections, want %d; all: %v", key, seen[key], n, seen)
		}
	}
}

// A packet to an address that no rule turns elsewhere has a route out of the
// node, and dies on the LAN without any answer.
func TestNoWayOut(t *testing.T) {
	got := make(chan Report, 10)
	text := strings.Replace(twoNodes, "http://10.244.1.2:8080 rate=50 count=20", "tcp://10.96.0.1:80 rate=50 count=1", 1)
	l := startLab(t, text, Config{Report: func(r Report) {
		if strings.Contains(r.URL, "10.96") {
			got <- r
		}
	}})
	if err := l.StartTraffic(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	select {
	case r := <-got:
		if r.Err != FailTimeout || r.End.Sub(r.Start) < connectPatience {
			t.Errorf("%+v; want a timeout", r)
		}
	case <-time.After(10 * time.Second):
		t.Error("no report")
	}
}

func dial(t *testing.T, l *Lab, from, to string) Report {
	t.Helper()
	p := l.pods[from]
	var r Report
	err := l.Do(PodSpace(p.Namespace, p.Name), func() error {
		c := client{id: from, addr: p.Addr}
		r = c.connect(Target{Scheme: "http", Addr: netip.MustParseAddrPort(to)})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Faults do what they say, and heal undoes them.
func TestFaults(t *testing.T) {
	l := startLab(t, twoNodes, Config{})
	ctx := within(t, 60*time.Second)
	const near, far = "10.244.1.2:8080", "10.244.2.2:8080"
	for _, tt := range []struct {
		fault string
		delay time.Duration
		want  string
	}{
		{FaultRefuse, 0, FailRefused},
		{FaultKill, 0, FailRefused},
		{FaultBlackhole, 0, FailTimeout},
		{FaultSlow, 300 * time.Millisecond, ""},
	} {
		t.Run(tt.fault, func(t *testing.T) {
			if err := l.Fault(ctx, tt.fault, "shop/near", tt.delay); err != nil {
				t.Fatal(err)
			}
			r := dial(t, l, "shop/web", near)
			if r.Err != tt.want {
				t.Errorf("with the fault: %+v, want error %q", r, tt.want)
			}
			if took := r.End.Sub(r.Start); took < tt.delay {
				t.Errorf("slowed by %v, it took %v", tt.delay, took)
			}
			if faults := l.Faults("shop/near"); len(faults) != 1 || faults[0] != tt.fault {
				t.Errorf("Faults = %v", faults)
			}
			if r := dial(t, l, "shop/web", far); r.Err != "" {
				t.Errorf("another pod suffers: %+v", r)
			}
			if tt.fault == FaultBlackhole {
				checkARP(t, l)
				// The node itself gets no answer either: masqueraded
				// connections come from its address.
				err := l.Do("node/node1", func() error {
					c := client{addr: netip.MustParseAddr("10.244.1.1")}
					r = c.connect(Target{Scheme: "http", Addr: netip.MustParseAddrPort(near)})
					return nil
				})
				if err != nil || r.Err != FailTimeout {
					t.Errorf("from the node: %+v, %v; want a timeout", r, err)
				}
			}
			if err := l.Fault(ctx, FaultHeal, "shop/near", 0); err != nil {
				t.Fatal(err)
			}
			if r := dial(t, l, "shop/web", near); r.Err != "" || r.Server != "shop/near" || r.End.Sub(r.Start) > 200*time.Millisecond {
				t.Errorf("healed: %+v", r)
			}
		})
	}
	if err := l.Fault(ctx, FaultKill, "shop/nobody", 0); err == nil || !strings.Contains(err.Error(), "pod/shop/near") {
		t.Errorf("fault of an absent pod: %v; want the pods there are", err)
	}
	if err := l.Fault(ctx, FaultSlow, "shop/near", 0); err == nil {
		t.Error("slowed by nothing: no error")
	}
}

// checkARP wants the blackholed pod still to be known to its node.
func checkARP(t *testing.T, l *Lab) {
	t.Helper()
	var out bytes.Buffer
	p, err := l.Exec("node/node1", exec.Spec{Path: "cat", Args: []string{"/proc/net/arp"}, Stdout: &out})
	if err != nil {
		t.Fatal(err)
	}
	p.Wait()
	for line := range strings.Lines(out.String()) {
		if f := strings.Fields(line); f[0] == "10.244.1.2" && f[2] == "0x2" {
			return
		}
	}
	t.Errorf("the node no longer resolves the pod:\n%s", out.String())
}

func TestOneLabOnly(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "node1.sock")
	if err := os.WriteFile(stale, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	first := startLab(t, twoNodes, Config{SocketDir: dir})
	if _, err := os.Stat(stale); err == nil {
		t.Error("a dead lab's socket was left")
	}
	if _, err := Start(t.Context(), Config{Dir: first.cfg.Dir, SocketDir: dir, NoProxy: true}); err == nil || !strings.Contains(err.Error(), "lab down") {
		t.Errorf("a second lab: %v; want a hint", err)
	}
	first.Close()
	second, err := Start(t.Context(), Config{Dir: first.cfg.Dir, SocketDir: dir, NoProxy: true})
	if err != nil {
		t.Fatal(err)
	}
	second.Close()
}

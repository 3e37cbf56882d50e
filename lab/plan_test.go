package lab

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/kube/manifests"
)

func readText(t *testing.T, text string) (*Cluster, []proxy.Problem, error) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "all.yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return Read(dir)
}

const planText = `
apiVersion: v1
kind: Node
metadata: {name: node1}
spec: {podCIDR: 10.244.1.0/24}
status: {addresses: [{type: InternalIP, address: 172.18.0.1}]}
---
apiVersion: v1
kind: Node
metadata: {name: node2}
spec: {podCIDR: 10.244.2.0/24}
status: {addresses: [{type: InternalIP, address: 172.18.1.12}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop}
spec: {nodeName: node2, containers: []}
status: {podIP: 10.244.2.10}
---
apiVersion: v1
kind: Pod
metadata: {name: laptop, namespace: shop, annotations: {kptrace.dev/external: "true"}}
spec: {containers: []}
status: {podIP: 172.18.0.2}
`

func TestPlan(t *testing.T) {
	c, problems, err := readText(t, planText)
	if err != nil || len(problems) > 0 {
		t.Fatal(err, problems)
	}
	top, err := Plan(c, Options{})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	spaces := map[string]Space{}
	for _, s := range top.Spaces {
		names = append(names, s.Name)
		spaces[s.Name] = s
	}
	if got := strings.Join(names, " "); got != "lan node/node1 node/node2 pod/shop/web pod/shop/laptop" {
		t.Errorf("spaces: %s", got)
	}
	// .1 is a node and .2 the client; two /24 fit in a /23.
	if a := spaces["lan"].Addrs; len(a) != 1 || a[0].Prefix.String() != "172.18.0.3/23" {
		t.Errorf("LAN: %v", a)
	}
	route := func(space, dst, via, dev string) {
		t.Helper()
		r := Route{Dst: netip.MustParsePrefix(dst), Dev: dev}
		if via != "" {
			r.Via = netip.MustParseAddr(via)
		}
		if !slices.Contains(spaces[space].Routes, r) {
			t.Errorf("%s has no route %v: %v", space, r, spaces[space].Routes)
		}
	}
	dev := devName("veth", "pod/shop/web")
	route("node/node1", "10.244.2.0/24", "172.18.1.12", "eth0")
	route("node/node1", "0.0.0.0/0", "172.18.0.3", "eth0")
	route("node/node2", "10.244.1.0/24", "172.18.0.1", "eth0")
	route("node/node2", "10.244.2.10/32", "", dev)
	route("pod/shop/web", "10.244.2.1/32", "", "eth0")
	route("pod/shop/web", "0.0.0.0/0", "10.244.2.1", "eth0")
	route("pod/shop/laptop", "0.0.0.0/0", "172.18.0.3", "eth0")
	if len(top.Links) != 4 || len(dev) > 15 {
		t.Errorf("links: %v; device name %q", top.Links, dev)
	}
	for _, l := range top.Links {
		for _, e := range []End{l.A, l.B} {
			if _, ok := spaces[e.Space]; !ok || len(e.Dev) > 15 {
				t.Errorf("link end %v", e)
			}
		}
	}
	set := func(opt Options, name string) bool {
		top, err := Plan(c, opt)
		return err == nil && slices.ContainsFunc(top.Spaces[1].Sysctls, func(s Sysctl) bool { return strings.HasSuffix(s.Name, name) })
	}
	if !set(Options{}, "tcp_timeout_time_wait") || set(Options{KernelTimeouts: true}, "tcp_timeout_time_wait") {
		t.Error("KernelTimeouts does not decide about conntrack timeouts")
	}
	if !set(Options{}, "ip_forward") || !set(Options{KernelTimeouts: true}, "ip_forward") {
		t.Error("nodes do not forward")
	}
}

func TestPlanRefuses(t *testing.T) {
	for name, tt := range map[string]struct{ old, new, want string }{
		"pod range on the LAN": {"10.244.2.0/24", "172.18.0.0/24", "overlaps the nodes' LAN"},
		"same pod range":       {"podCIDR: 10.244.1.0/24", "podCIDR: 10.244.2.0/25", "overlap"},
		"far apart":            {"172.18.1.12", "9.0.0.1", "too far apart"},
	} {
		text := strings.Replace(planText, tt.old, tt.new, 1)
		if name == "pod range on the LAN" {
			text = strings.Replace(text, "10.244.2.10", "172.18.0.77", 1)
		}
		c, _, err := readText(t, text)
		if err == nil {
			_, err = Plan(c, Options{})
		}
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q", name, err, tt.want)
		}
	}
}

// A bad object is named and left out; the rest is built.
func TestReadProblems(t *testing.T) {
	for name, tt := range map[string]struct{ old, new, object, field string }{
		"no pod address":   {"podIP: 10.244.2.10", "podIP: ''", "Pod shop/web", "status.podIP"},
		"wrong range":      {"podIP: 10.244.2.10", "podIP: 10.244.1.10", "Pod shop/web", "status.podIP"},
		"gateway's":        {"podIP: 10.244.2.10", "podIP: 10.244.2.1", "Pod shop/web", "status.podIP"},
		"unknown node":     {"nodeName: node2", "nodeName: node9", "Pod shop/web", "spec.nodeName"},
		"traffic":          {"name: web, namespace: shop", "name: web, namespace: shop, annotations: {kptrace.dev/traffic: 'ftp://x'}", "Pod shop/web", "metadata.annotations.kptrace.dev/traffic"},
		"address twice":    {"podIP: 172.18.0.2", "podIP: 172.18.0.1", "Pod shop/laptop", "status.podIP"},
		"no node address":  {"address: 172.18.0.1}", "address: nowhere}", "Node node1", "status.addresses"},
		"no pod range":     {"podCIDR: 10.244.1.0/24", "podCIDR: ''", "Node node1", "spec.podCIDR"},
		"pod range for v6": {"podCIDR: 10.244.1.0/24", "podCIDR: 'fd00::/64'", "Node node1", "spec.podCIDR"},
	} {
		c, problems, err := readText(t, strings.Replace(planText, tt.old, tt.new, 1))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(problems) != 1 || problems[0].Object != tt.object || problems[0].Field != tt.field || problems[0].File != "all.yaml" {
			t.Errorf("%s: problems %v", name, problems)
		}
		if len(c.Nodes)+len(c.Pods) < 3 {
			t.Errorf("%s: too much was left out: %+v", name, c)
		}
		if _, err := Plan(c, Options{}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := readText(t, "{}"); err == nil || !strings.Contains(err.Error(), "no usable Node") {
		t.Errorf("nothing at all: %v", err)
	}
}

func TestParseTraffic(t *testing.T) {
	c := Cluster{
		Nodes: []Node{{Name: "node1", Addr: netip.MustParseAddr("172.18.0.1")}},
		Services: []Service{
			{Namespace: "shop", Name: "foo", Proto: conntrack.TCP, ClusterIP: netip.MustParseAddr("10.96.0.10"), Number: 80},
			{Namespace: "kube-system", Name: "dns", Proto: conntrack.UDP, ClusterIP: netip.MustParseAddr("10.96.0.53"), Number: 53},
		},
	}
	got, err := ParseTraffic("http://foo rate=20 concurrency=4; udp://dns.kube-system.svc.cluster.local:53 count=7\ntcp://node1:30080 after=2s\n;\n http://10.0.0.1:8080", c.resolve("shop"))
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort
	want := []Target{
		{URL: "http://foo", Scheme: "http", Addr: at("10.96.0.10:80"), Rate: 20, Concurrency: 4},
		{URL: "udp://dns.kube-system.svc.cluster.local:53", Scheme: "udp", Addr: at("10.96.0.53:53"), Rate: 5, Concurrency: 16, Count: 7},
		{URL: "tcp://node1:30080", Scheme: "tcp", Addr: at("172.18.0.1:30080"), Rate: 5, Concurrency: 16, After: 2 * time.Second},
		{URL: "http://10.0.0.1:8080", Scheme: "http", Addr: at("10.0.0.1:8080"), Rate: 5, Concurrency: 16},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	for _, bad := range []string{
		"foo", "ftp://foo", "tcp://foo", "udp://foo:0", "tcp://foo:70000", "http://nobody", "http://foo.elsewhere",
		"http://foo rate=0", "http://foo rate=-1", "http://foo rate=NaN", "http://foo rate=1e9", "http://foo concurrency=0",
		"http://foo concurrency=100000", "http://foo count=0", "http://foo after=-1s", "http://foo speed=3",
	} {
		if got, err := ParseTraffic(bad, c.resolve("shop")); err == nil {
			t.Errorf("%q: no error, %+v", bad, got)
		}
	}
}

// The shipped scenarios are sound for the lab and for the proxy, and show
// what the README says they do.
func TestScenarios(t *testing.T) {
	for _, name := range Scenarios() {
		dir := filepath.Join(t.TempDir(), name)
		if err := WriteScenario(name, dir); err != nil {
			t.Fatal(err)
		}
		c, problems, err := Read(dir)
		if err != nil || len(problems) > 0 {
			t.Fatalf("%s: %v, %v", name, err, problems)
		}
		if _, err := Plan(c, Options{}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, n := range c.Nodes {
			snap, err := manifests.New(manifests.Config{Dir: dir, Node: n.Name}).Load()
			if err != nil || len(snap.Problems) > 0 {
				t.Errorf("%s on %s: %v, %v", name, n.Name, err, snap.Problems)
			}
		}
		if err := WriteScenario(name, dir); err == nil {
			t.Errorf("%s: a folder was overwritten", name)
		}
	}
	if err := WriteScenario("nope", t.TempDir()); err == nil {
		t.Error("an unknown scenario: no error")
	}
}

func TestDemo(t *testing.T) {
	dir := t.TempDir()
	if err := WriteScenario(DefaultScenario, dir); err != nil {
		t.Fatal(err)
	}
	c, _, err := Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	dialled := map[*Service]int{}
	clients := 0
	for _, p := range c.Pods {
		if len(p.Traffic) > 0 && !p.External {
			clients++
		}
		for _, target := range p.Traffic {
			proto := conntrack.TCP
			if target.Scheme == "udp" {
				proto = conntrack.UDP
			}
			s := c.service(proto, target.Addr)
			if s == nil {
				t.Errorf("pod %s connects to %s, which is no Service", p.ID(), target.URL)
			}
			dialled[s]++
		}
	}
	if clients != 2 || len(dialled) != len(c.Services) || len(c.Services) != 6 {
		t.Errorf("%d clients in the cluster, traffic to %d of %d Services", clients, len(dialled), len(c.Services))
	}
	snap, err := manifests.New(manifests.Config{Dir: dir, Node: "node1"}).Load()
	if err != nil {
		t.Fatal(err)
	}
	for service, want := range map[string]int{"foo": 3, "sticky": 3, "front": 2, "flaky": 2, "empty": 0, "dns": 2} {
		i := slices.IndexFunc(snap.Services, func(s proxy.Service) bool { return s.Name.Name == service })
		if i < 0 {
			t.Errorf("no Service %s", service)
			continue
		}
		s := &snap.Services[i]
		sel := s.Select(snap.Node, proxy.Overlay{})
		if len(sel.Cluster) != want {
			t.Errorf("%s: %d endpoints, want %d", service, len(sel.Cluster), want)
		}
		if service == "foo" && sel.Excluded.NotReady != 1 {
			t.Errorf("foo excludes %+v, want one that is not ready", sel.Excluded)
		}
		for _, ep := range sel.Cluster {
			p, ok := c.pod("shop/" + ep.Pod)
			if !ok || p.Addr != ep.Addr.Addr() {
				t.Errorf("%s: endpoint %s is no pod", service, ep.Addr)
			} else if listens := slices.ContainsFunc(p.Serves, func(s Port) bool { return s.Number == ep.Addr.Port() }); listens == (ep.Pod == "dead") {
				t.Errorf("%s: pod %s listens: %t", service, ep.Pod, listens)
			}
		}
	}
}

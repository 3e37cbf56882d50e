package iptables

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

func service(key, proto, ip string, port uint16, eps ...string) proxy.Service {
	ns, rest, _ := strings.Cut(key, "/")
	name, portName, _ := strings.Cut(rest, ":")
	p, err := conntrack.ParseProto(proto)
	if err != nil {
		panic(err)
	}
	s := proxy.Service{Name: proxy.PortName{Namespace: ns, Name: name, Port: portName, Proto: p},
		Type: "ClusterIP", ClusterIP: netip.MustParseAddr(ip), Port: port}
	for _, e := range eps {
		addr, words, _ := strings.Cut(e, " ")
		s.Endpoints = append(s.Endpoints, proxy.Endpoint{Addr: netip.MustParseAddrPort(addr), Ready: true, Serving: true,
			Local: strings.Contains(words, "local")})
	}
	return s
}

func ips(s ...string) (out []netip.Addr) {
	for _, x := range s {
		out = append(out, netip.MustParseAddr(x))
	}
	return out
}

// overall is the Services of upstream's TestOverallIPTablesRules.
func overall() *proxy.Snapshot {
	svc1 := service("ns1/svc1:p80", "tcp", "172.30.0.41", 80, "10.180.0.1:80")
	svc2 := service("ns2/svc2:p80", "tcp", "172.30.0.42", 80, "10.180.0.2:80")
	svc2.Type, svc2.NodePort, svc2.HealthCheckNodePort, svc2.ExternalLocal = "LoadBalancer", 3001, 30000, true
	svc2.ExternalIPs, svc2.LoadBalancerIPs = ips("192.168.99.22"), ips("1.2.3.4")
	svc3 := service("ns3/svc3:p80", "tcp", "172.30.0.43", 80, "10.180.0.3:80")
	svc3.Type, svc3.NodePort = "NodePort", 3003
	svc4 := service("ns4/svc4:p80", "tcp", "172.30.0.44", 80, "10.180.0.4:80", "10.180.0.5:80")
	svc4.Type, svc4.NodePort, svc4.ExternalIPs = "NodePort", 3002, ips("192.168.99.33")
	svc5 := service("ns5/svc5:p80", "tcp", "172.30.0.45", 80, "10.180.0.3:80")
	svc5.Type, svc5.NodePort, svc5.LoadBalancerIPs, svc5.Affinity = "LoadBalancer", 3004, ips("5.6.7.8"), 10800e9
	svc5.SourceRanges = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/25")}
	svc6 := service("ns6/svc6:p80", "tcp", "172.30.0.46", 80)
	return &proxy.Snapshot{
		Node:     proxy.Node{Name: "node1", Addrs: ips("192.168.0.2")},
		Services: []proxy.Service{svc1, svc2, svc3, svc4, svc5, svc6},
	}
}

func overallConfig() Config {
	return Config{ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, LocalhostNodePorts: true}
}

func TestGolden(t *testing.T) {
	plain, traced := overallConfig(), overallConfig()
	traced.Trace = true
	for name, cfg := range map[string]Config{"overall.txt": plain, "traced.txt": traced} {
		p := New(cfg).Render(overall(), proxy.Overlay{})
		if len(p.Problems()) > 0 {
			t.Errorf("%s: problems: %v", name, p.Problems())
		}
		golden(t, filepath.Join("testdata", name), p.Text())
	}
}

// golden compares with a file; KPTRACE_UPDATE=1 writes it instead.
func golden(t *testing.T, file, got string) {
	t.Helper()
	if os.Getenv("KPTRACE_UPDATE") != "" {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); d != "" {
		t.Errorf("%s (-want +got):\n%s", file, d)
	}
}

// TestBudget keeps the number of rules to that of kube-proxy.
func TestBudget(t *testing.T) {
	count := func(s *proxy.Snapshot, table string) (n int) {
		p := New(overallConfig()).Render(s, proxy.Overlay{}).(*program)
		p.eachChain(table, renderAll(p.units), func(_ string, rules []string) { n += len(rules) })
		return n
	}
	s := &proxy.Snapshot{}
	if f, n := count(s, "filter"), count(s, "nat"); f != 4 || n != 5 {
		t.Errorf("no Services: %d rules in filter and %d in nat, want 4 and 5", f, n)
	}
	for e := range 5 {
		var eps []string
		for i := range e {
			eps = append(eps, fmt.Sprintf("10.0.0.%d:80", i+1))
		}
		s := &proxy.Snapshot{Services: []proxy.Service{service("a/b:c", "tcp", "10.96.0.1", 80, eps...)}}
		wantFilter, wantNAT := 4, 5+2+3*e
		if e == 0 {
			wantFilter, wantNAT = 5, 5
		}
		if f, n := count(s, "filter"), count(s, "nat"); f != wantFilter || n != wantNAT {
			t.Errorf("%d endpoints: %d rules in filter and %d in nat, want %d and %d", e, f, n, wantFilter, wantNAT)
		}
	}
}

func TestProbability(t *testing.T) {
	for n, want := range map[int]string{1: "1.00000000000", 2: "0.50000000000", 3: "0.33333333349", 7: "0.14285714272"} {
		if got := probability(n); got != want {
			t.Errorf("probability(%d) = %s, want %s", n, got, want)
		}
	}
}

func TestRenderIsPure(t *testing.T) {
	b := New(overallConfig())
	first := b.Render(overall(), proxy.Overlay{}).Text()
	for range 3 {
		if b.Render(overall(), proxy.Overlay{}).Text() != first {
			t.Fatal("the same Snapshot gives another program")
		}
	}
	s := overall()
	s.Services[3].Endpoints = s.Services[3].Endpoints[:1]
	other := b.Render(s, proxy.Overlay{}).Text()
	if other != New(overallConfig()).Render(s, proxy.Overlay{}).Text() {
		t.Error("a change gives another program than a fresh start")
	}
	if b.Render(overall(), proxy.Overlay{}).Text() != first {
		t.Error("changing back gives another program")
	}
}

func TestProblems(t *testing.T) {
	s := overall()
	bad := service(`x/quo"te`, "tcp", "172.30.1.1", 80, "10.0.0.1:80")
	zero := service("x/zero", "tcp", "172.30.1.2", 0, "10.0.0.1:80")
	icmp := service("x/icmp", "icmp", "172.30.1.3", 80, "10.0.0.1:80")
	twice := service("x/twice", "tcp", "172.30.0.41", 80, "10.0.0.1:80")
	port := service("x/port", "tcp", "172.30.1.4", 80, "10.0.0.1:80", "10.0.0.1:80")
	port.NodePort = 3003
	port.Endpoints = append(port.Endpoints, proxy.Endpoint{Addr: netip.MustParseAddrPort("10.0.0.9:0"), Ready: true},
		proxy.Endpoint{Addr: netip.MustParseAddrPort("[fd00::1]:80"), Ready: true})
	six := service("x/six", "tcp", "fd00::1", 80, "[fd00::2]:80")
	s.Services = append(s.Services, bad, zero, icmp, twice, port, six)
	p := New(overallConfig()).Render(s, proxy.Overlay{})
	var got []string
	for _, pr := range p.Problems() {
		got = append(got, pr.Error())
	}
	want := []string{
		`Service x/quo"te: metadata.name: the name "x/quo\"te" cannot be written into a rule`,
		`Service x/zero: spec.ports: port "" has the number 0; use 1 to 65535`,
		`Service x/icmp: spec.ports: protocol icmp cannot be proxied: use TCP, UDP or SCTP`,
		`Service x/twice: spec.clusterIP: 172.30.0.41:80 tcp is taken by Service ns1/svc1:p80; choose another`,
		`Service x/port: spec.ports.nodePort: 3003 tcp is taken by Service ns3/svc3:p80; choose another`,
		`Service x/port: endpoints: 10.0.0.9:0 is no address that can be dialled; the endpoint is left out`,
		`Service x/port: endpoints: [fd00::1]:80 is no address that can be dialled; the endpoint is left out`,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("problems (-want +got):\n%s", d)
	}
	text := p.Text()
	for _, name := range []string{"quo", "zero", "icmp", "twice", "x/six"} {
		if strings.Contains(text, "x/"+name) {
			t.Errorf("%s is programmed", name)
		}
	}
	if !strings.Contains(text, `-d 172.30.1.4/32 -p tcp -m comment --comment "x/port cluster IP"`) ||
		strings.Count(text, "x/port -> ") != 1 {
		t.Error("the good part of x/port is not programmed")
	}
}

func TestTags(t *testing.T) {
	cfg := overallConfig()
	cfg.Trace = true
	p := New(cfg).Render(overall(), proxy.Overlay{})
	prefixes := regexp.MustCompile(`-A (\S+) .*--nflog-prefix "([^"]*)"`).FindAllStringSubmatch(p.Text(), -1)
	seen := map[string]bool{}
	for _, m := range prefixes {
		r := p.Index().Lookup([]byte(m[2]))
		if r == nil {
			t.Errorf("tag %q is not in the index", m[2])
			continue
		}
		if r.Chain != m[1] || r.Purpose == "" {
			t.Errorf("tag %q: chain %q, purpose %q; want chain %s", m[2], r.Chain, r.Purpose, m[1])
		}
		seen[m[2]] = true
	}
	if len(seen) != len(p.Index()) || len(seen) == 0 {
		t.Errorf("%d tags in rules, %d in the index", len(seen), len(p.Index()))
	}
	r := p.Index().Lookup([]byte("kp1:pick:SXIVWICOYRO3J4NJ"))
	if r == nil || r.Purpose != "pick 10.180.0.1:80 for ns1/svc1:p80" || r.Endpoint != netip.MustParseAddrPort("10.180.0.1:80") {
		t.Errorf("rule of a known tag: %+v", r)
	}
}

package redact

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/proxy/liverules/nftables"
)

var testKey = []byte("a key of a test, 32 bytes or more")

// TestAddresses keeps what addresses have in common, and what stays.
func TestAddresses(t *testing.T) {
	t.Parallel()
	common := func(a, b netip.Addr) int {
		n := 0
		for ; n < a.BitLen(); n++ {
			p, _ := a.Prefix(n + 1)
			if !p.Contains(b) {
				break
			}
		}
		return n
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, level := range []Level{Names, All} {
		r := New(level, testKey)
		seen := map[netip.Addr]netip.Addr{}
		var last [2]netip.Addr
		for i := range 4000 {
			var b [16]byte
			for j := range b {
				b[j] = byte(rnd.Uint32())
			}
			a := netip.AddrFrom16(b)
			if i%2 == 0 {
				a = netip.AddrFrom4([4]byte(b[:4]))
			}
			if prev := last[i%2]; prev.IsValid() && i%8 > 3 { // one that is near
				s := prev.AsSlice()
				s[len(s)-1-i%3] ^= byte(i)
				a, _ = netip.AddrFromSlice(s)
			}
			m := r.Addr(a)
			if was, ok := seen[m]; ok && was != a {
				t.Fatalf("%v and %v both become %v", was, a, m)
			}
			seen[m] = a
			if prev := last[i%2]; prev.IsValid() && common(a, prev) != common(m, r.Addr(prev)) {
				t.Fatalf("%v and %v share %d bits, %v and %v %d", a, prev, common(a, prev), m, r.Addr(prev), common(m, r.Addr(prev)))
			}
			last[i%2] = a
		}
	}
	names, all := New(Names, testKey), New(All, testKey)
	for _, c := range []struct {
		addr       string
		names, all bool // is replaced
		within     string
	}{
		{"127.0.0.1", false, false, ""}, {"0.0.0.0", false, false, ""}, {"169.254.25.10", false, false, ""},
		{"224.0.0.1", false, false, ""}, {"255.255.255.255", false, false, ""}, {"::", false, false, ""}, {"::1", false, false, ""},
		{"fe80::1234", false, false, ""}, {"ff02::1", false, false, ""},
		{"10.96.0.10", false, true, "10.0.0.0/8"}, {"192.168.7.9", false, true, "192.168.0.0/16"}, {"172.18.0.11", false, true, "172.16.0.0/12"},
		{"100.65.1.2", false, true, "100.64.0.0/10"}, {"fd00:10:244::21", false, true, "fc00::/7"},
		{"203.0.113.10", true, true, "200.0.0.0/5"}, {"8.8.8.8", true, true, ""}, {"2001:db8::7", true, true, ""},
	} {
		a := netip.MustParseAddr(c.addr)
		if got := names.Addr(a) != a; got != c.names {
			t.Errorf("%v: replaced %v at level names", a, got)
		}
		m := all.Addr(a)
		if got := m != a; got != c.all || c.within != "" && !netip.MustParsePrefix(c.within).Contains(m) {
			t.Errorf("%v becomes %v at level all", a, m)
		}
	}
	if p := all.Prefix(netip.MustParsePrefix("10.244.0.0/16")); !p.Contains(all.Addr(netip.MustParseAddr("10.244.3.4"))) || p != p.Masked() {
		t.Errorf("the range became %v", p)
	}
}

func secretSnapshot() *proxy.Snapshot {
	addr, port := netip.MustParseAddr, netip.MustParseAddrPort
	s := &proxy.Snapshot{
		Node: proxy.Node{Name: "worker-zebra", Zone: "mars-1a", Addrs: []netip.Addr{addr("198.51.100.11")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}},
		Pods: map[netip.Addr]proxy.Pod{
			addr("10.244.1.21"): {Namespace: "bakery", Name: "oven-7d9f-x2", Node: "worker-zebra", Workload: "Deployment/oven"},
			addr("10.244.1.22"): {Namespace: "bakery", Name: "oven-7d9f-k8", Node: "worker-zebra", Workload: "Deployment/oven"},
		},
		Problems: []proxy.Problem{{File: "/home/walrus/bad.yaml", Object: "Service bakery/broken-thing", Message: "spec.clusterIP 203.0.113.77 is no address of bakery"}},
	}
	svc := func(ns, name string, ip string, eps ...string) proxy.Service {
		x := proxy.Service{
			Name: proxy.PortName{Namespace: ns, Name: name, Port: "http", Proto: conntrack.TCP}, Type: "LoadBalancer", ClusterIP: addr(ip), Port: 80,
			NodePort: 30080, LoadBalancerIPs: []netip.Addr{addr("203.0.113.10")}, SourceRanges: []netip.Prefix{netip.MustParsePrefix("203.0.113.128/25")},
		}
		for _, e := range eps {
			x.Endpoints = append(x.Endpoints, proxy.Endpoint{Addr: port(e), Ready: true, Serving: true, Local: true, Node: "worker-zebra", Zone: "mars-1a", Namespace: ns, Pod: s.Pods[port(e).Addr()].Name})
		}
		return x
	}
	s.Services = []proxy.Service{svc("bakery", "oven", "10.96.0.10", "10.244.1.21:8080", "10.244.1.22:8080", "10.244.1.23:8080")}
	other := svc("bakery", "pretzel", "10.96.0.11", "10.244.1.21:9090")
	other.NodePort, other.LoadBalancerIPs, other.SourceRanges, other.Affinity = 0, nil, nil, 3600e9
	s.Services = append(s.Services, other)
	return s
}

// originals are what must not be found any more.
func originals(level Level) []string {
	list := []string{"zebra", "mars", "bakery", "oven", "pretzel", "broken", "walrus", "203.0.113.", "198.51.100."}
	if level == All {
		list = append(list, "10.244.1.", "10.96.0.")
	}
	return list
}

func noOriginals(t *testing.T, what, text string, level Level) {
	t.Helper()
	for _, w := range originals(level) {
		if i := strings.Index(text, w); i >= 0 {
			t.Errorf("%s: %q is in it: …%s…", what, w, text[max(0, i-60):min(len(text), i+60)])
		}
	}
}

// TestRules renders rules, redacts them, and compares what they mean: the redacted
// rules are those that the redacted state asks for, but for their order.
func TestRules(t *testing.T) {
	t.Parallel()
	for _, level := range []Level{Names, All} {
		s := secretSnapshot()
		text := iptables.New(iptables.Config{Family: xtables.IPv4, LocalhostNodePorts: true, Trace: true}).Render(s, proxy.Overlay{}).Text()
		r := New(level, testKey)
		r.Learn(s)
		red := r.Rules(text)
		noOriginals(t, "rules", red, level)
		after := r.Snapshot(s)
		program := func(text string) *liverules.Program {
			rs, err := xtables.Parse(xtables.IPv4, text)
			if err != nil {
				t.Fatalf("%v in\n%s", err, text)
			}
			return liverules.New(liverules.Config{}, rs)
		}
		was, is := program(text), program(red)
		want := strings.Fields(iptables.New(iptables.Config{Family: xtables.IPv4, LocalhostNodePorts: true, Trace: true}).Render(after, proxy.Overlay{}).Text())
		got := strings.Fields(red)
		slices.Sort(want)
		slices.Sort(got)
		if d := cmp.Diff(want, got); d != "" && level == Names { // with All the order of endpoints, and so odds by place, differ
			t.Errorf("the redacted rules are not those of the redacted state (-state +rules):\n%s", d)
		}
		if len(was.Services()) != 2 || len(is.Services()) != 2 {
			t.Fatalf("%d Services, redacted %d", len(was.Services()), len(is.Services()))
		}
		for _, dst := range []string{"10.96.0.10:80", "203.0.113.10:80", "10.96.0.11:80", "10.96.0.99:80"} {
			for _, src := range []string{"10.244.1.21:4000", "203.0.113.200:4000", "203.0.113.5:4000"} {
				p := proxy.Packet{Proto: conntrack.TCP, Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst)}
				a := was.Walk(p)
				p.Src, p.Dst = r.AddrPort(p.Src), r.AddrPort(p.Dst)
				b := is.Walk(p)
				if a.Verdict != b.Verdict || a.Reason != b.Reason || r.PortName(a.Service) != b.Service || len(a.Choices) != len(b.Choices) {
					t.Fatalf("%s > %s: was %v %s %v, is %v %s %v", src, dst, a.Verdict, a.Reason, a.Service, b.Verdict, b.Reason, b.Service)
				}
				for i := range a.Choices {
					x, y := a.Choices[i], b.Choices[i]
					if r.AddrPort(x.Endpoint) != y.Endpoint || x.Probability != y.Probability || x.Masquerade != y.Masquerade || len(x.Steps) != len(y.Steps) {
						t.Errorf("%s > %s: was %v %v, is %v %v", src, dst, x.Endpoint, x.Probability, y.Endpoint, y.Probability)
					}
				}
			}
		}
	}
}

// TestNFTables redacts what upstream's nftables mode writes: it still parses, and
// every Service has the odds it had.
func TestNFTables(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../../cmd/kptrace/testdata/upstream/upstream-nftables.rules")
	if err != nil {
		t.Fatal(err)
	}
	was, err := nftables.Parse(nftables.Config{}, string(text))
	if err != nil {
		t.Fatal(err)
	}
	r := New(All, testKey)
	r.LearnRules(was)
	red := r.Text(string(text))
	is, err := nftables.Parse(nftables.Config{}, red)
	if err != nil {
		t.Fatal(err)
	}
	if len(is.Unknown()) > 0 || len(is.Services()) != len(was.Services()) {
		t.Fatalf("%d Services of %d, not understood: %v", len(is.Services()), len(was.Services()), is.Unknown())
	}
	after := map[string]*liverules.Service{}
	for _, s := range is.Services() {
		after[fmt.Sprint(s.Name, s.Name.Proto, s.IP6)] = s
	}
	for _, s := range was.Services() {
		x := after[fmt.Sprint(r.PortName(s.Name), s.Name.Proto, s.IP6)]
		if x == nil || len(x.Fronts) != len(s.Fronts) || x.Affinity != s.Affinity || len(x.Ranges) != len(s.Ranges) {
			t.Errorf("%s was %+v, is %+v", s.Name, s, x)
			continue
		}
		for i := range s.Fronts {
			a, b := s.Fronts[i], x.Fronts[i]
			if r.Addr(a.Addr) != b.Addr || a.Port != b.Port || a.Verdict != b.Verdict || len(a.Choices) != len(b.Choices) {
				t.Errorf("%s at %v: is %+v", s.Name, &a, b)
			}
		}
	}
	for _, w := range []string{"shop", "affinity-one", "10.244.2.", "203.0.113.", "198.18.0.", "10.96."} {
		if i := strings.Index(red, w); i >= 0 {
			t.Errorf("%q is in it: …%s…", w, red[max(0, i-80):min(len(red), i+60)])
		}
	}
}

// TestText replaces in all kinds of text.
func TestText(t *testing.T) {
	t.Parallel()
	for _, level := range []Level{Names, All} {
		r := New(level, testKey)
		r.Learn(secretSnapshot())
		for name, text := range map[string]string{
			"prose":   "Service bakery/oven:http on worker-zebra (198.51.100.11): oven-7d9f-x2 and the old oven-55aa-zz; bakery/unheard-of too; a file /home/walrus/x, https://zebra.example:6443/path; from 203.0.113.7:4000",
			"dns":     "oven.bakery.svc.cluster.local, worker-zebra.log",
			"nft":     `chain service-ABCDEFGH-bakery/oven/tcp/http { comment "bakery/oven:http" ; ip daddr 203.0.113.10 tcp dport 80 goto endpoint-ABCDEFG2-bakery/oven/tcp/http__203.0.113.21/80 }`,
			"mapped":  "::ffff:203.0.113.9 [::ffff:203.0.113.9]:80 203.0.113.128/25",
			"problem": "Service bakery/broken-thing: no",
		} {
			noOriginals(t, name, r.Text(text), level)
		}
		noOriginals(t, "metrics", r.Metrics(`kptrace_x{namespace="bakery",service="oven",endpoint="203.0.113.7:80"} 1`), level)
		noOriginals(t, "ipset", r.Rules(`add KUBE-LOAD-BALANCER 203.0.113.10,tcp:80 comment "bakery/oven:http"`), level)
		doc := r.JSON(`{"service":"oven","list":["bakery/oven","203.0.113.10"],"n":1.5,"q":"a \"oven\" \n"}`)
		noOriginals(t, "JSON", doc, level)
		if !strings.Contains(doc, `"service":"svc-`) || !strings.Contains(doc, `"n":1.5`) || !strings.Contains(doc, `\n`) {
			t.Errorf("JSON is %s", doc)
		}
		table := r.Virtual("IP Virtual Server version 1.2.1 (size=4096)\nProt LocalAddress:Port Scheduler Flags\nTCP  CB00710A:0050 rr persistent 60 FFFFFFFF\n  -> CB00710B:1F90      Masq    1      0          0\nTCP  [2001:0db8:0000:0000:0000:0000:0000:0001]:0050 rr\n")
		if strings.Contains(table, "CB0071") || strings.Contains(table, "2001:0db8") || !strings.Contains(table, ":1F90      Masq") || !strings.Contains(table, "FFFFFFFF") {
			t.Errorf("table is %s", table)
		}
	}
	same := "raw words: 10:20:30, sha256:ab12, v1.2.3, kptrace in iptables mode, kube-system/kube-dns, 50% of 3 endpoints, ::1, 127.0.0.1:80"
	r := New(Names, testKey)
	r.Learn(secretSnapshot())
	if got := r.Text(same); got != same {
		t.Errorf("replaced what nobody's is:\n%s\n%s", same, got)
	}
	if got := New(None, testKey).Text("bakery/oven 203.0.113.1"); got != "bakery/oven 203.0.113.1" {
		t.Errorf("level none: %s", got)
	}
}

func FuzzText(f *testing.F) {
	f.Add("Service bakery/oven:http 203.0.113.10:80/24 [fd00::1]:80 a/b")
	f.Fuzz(func(t *testing.T, s string) {
		r := New(All, testKey)
		r.Learn(secretSnapshot())
		r.JSON(s)
		r.Rules(s)
		r.Virtual(s)
		if once, again := r.Text(s), r.Text(s); once != again {
			t.Error("twice is not the same")
		}
	})
}

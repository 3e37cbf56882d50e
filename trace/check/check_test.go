package check_test

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/dataplane"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/proxytest"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/check"
)

// healthy is a node whose rules are what they should be.
func healthy(t *testing.T, s proxytest.Setup) (*check.State, string) {
	t.Helper()
	cfg := iptables.Config{MasqueradeAll: s.MasqueradeAll, LocalhostNodePorts: true, Trace: true}
	if s.Snapshot.Services[0].Is6() {
		cfg.Family = xtables.IPv6
	}
	if s.ClusterCIDR.IsValid() {
		cfg.ClusterCIDRs = []netip.Prefix{s.ClusterCIDR}
	}
	p := iptables.New(cfg).Render(s.Snapshot, s.Overlay)
	return &check.State{
		Node: "node1", Snapshot: s.Snapshot, Overlay: s.Overlay, Program: p, Addrs: s.Snapshot.Node.Addrs, Now: time.Now(),
		Dumps:    dumps(t, cfg.Family, p.Text()),
		Sysctls:  map[string]string{"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"},
		Counters: &conntrack.Stats{Entries: 10, Limit: 100},
	}, p.Text()
}

func dumps(t *testing.T, f xtables.Family, text string) []xtables.Dump {
	t.Helper()
	rs, err := xtables.Parse(f, text)
	if err != nil {
		t.Fatal(err)
	}
	return []xtables.Dump{{Family: f, Rules: rs}}
}

func TestQuietWhenHealthy(t *testing.T) {
	for _, c := range append(proxytest.Cases(), proxytest.Cases6()...) {
		s, _ := healthy(t, c.Setup)
		for _, f := range check.Run(s, check.Options{}) {
			t.Errorf("%s: %+v", c.Name, f)
		}
		s.Program = nil // another proxy's, of whom only the meaning is compared
		for _, f := range check.Run(s, check.Options{}) {
			t.Errorf("%s, another proxy: %+v", c.Name, f)
		}
	}
}

// TestFixIsOfTheProxy does not send those of our own proxy to a kube-proxy.
func TestFixIsOfTheProxy(t *testing.T) {
	s, text := healthy(t, proxytest.Cases()[0].Setup)
	family := s.Dumps[0].Family
	i := strings.Index(text, " -m statistic")
	from, to := strings.LastIndex(text[:i], "\n"), i+strings.Index(text[i:], "\n")
	s.Dumps = dumps(t, family, text[:from]+text[to:])
	for _, ours := range []bool{true, false} {
		if !ours {
			s.Program = nil
		}
		fixes := 0
		for _, f := range check.Run(s, check.Options{}) {
			if f.Code == "endpoint-missing" {
				fixes++
				if strings.Contains(f.Fix, "check --fix") != ours || strings.Contains(f.Fix, "restart kube-proxy") == ours {
					t.Errorf("ours %v: %s", ours, f.Fix)
				}
			}
		}
		if fixes == 0 {
			t.Errorf("ours %v: the deleted rule was not noticed", ours)
		}
	}
}

// TestEveryWrongRule takes away, doubles and alters every rule there is, one at a
// time, and wants each noticed.
func TestEveryWrongRule(t *testing.T) {
	c := proxytest.Cases()[0]
	s, text := healthy(t, c.Setup)
	lines := strings.Split(text, "\n")
	caught, meaning := 0, 0
	for i, line := range lines {
		if !strings.HasPrefix(line, "-A ") && !strings.HasPrefix(line, "-I ") {
			continue
		}
		chain := strings.Fields(line)[1]
		wrong := map[string]string{"deleted": ""}
		if strings.Contains(line, "--probability 0.") {
			wrong["odds"] = strings.Replace(line, "--probability 0.", "--probability 0.0", 1)
		}
		if strings.Contains(line, "--to-destination 10.") {
			wrong["endpoint"] = strings.Replace(line, "--to-destination 10.", "--to-destination 11.", 1)
		}
		if strings.Contains(line, "--dport ") {
			wrong["port"] = strings.Replace(line, "--dport ", "--dport 1", 1)
		}
		// KUBE-FIREWALL is kubelet's too, and twice does no harm.
		if strings.HasPrefix(chain, "KUBE-") && chain != "KUBE-FIREWALL" && strings.HasPrefix(line, "-A ") {
			wrong["doubled"] = line + "\n" + line
		}
		for how, instead := range wrong {
			changed := slices.Clone(lines)
			changed[i] = instead
			x := *s
			rs, err := xtables.Parse(xtables.IPv4, strings.Join(changed, "\n"))
			if err != nil {
				continue // no rule at all
			}
			x.Dumps = []xtables.Dump{{Rules: rs}}
			if len(check.Run(&x, check.Options{})) == 0 {
				t.Errorf("%s and not noticed: %s", how, line)
			}
			caught++
			// What changes where connections go must be noticed of any proxy.
			x.Program = nil
			decides := strings.Contains(line, "-j KUBE-SVC-") || strings.Contains(line, "-j KUBE-SEP-") && !strings.Contains(line, "recent") ||
				strings.Contains(line, "-j DNAT") || strings.Contains(line, "-j KUBE-EXT-")
			if decides && how != "doubled" && !strings.Contains(line, "-d 127.0.0.0/8") && !strings.Contains(line, "route LOCAL") {
				meaning++
				if len(check.Run(&x, check.Options{})) == 0 {
					t.Errorf("another proxy: %s and not noticed: %s", how, line)
				}
			}
		}
	}
	if caught < 200 || meaning < 50 {
		t.Errorf("only %d wrong rules were tried, %d of another proxy", caught, meaning)
	}
	t.Logf("%d wrong rules caught, %d of another proxy", caught, meaning)
}

// TestFindings breaks one thing after the other, and wants it called by its name.
func TestFindings(t *testing.T) {
	web := proxy.PortName{Namespace: "shop", Name: "web", Port: "http", Proto: conntrack.TCP}
	edit := func(f func(string) string) func(*testing.T, *check.State, string) {
		return func(t *testing.T, s *check.State, text string) {
			changed := f(text)
			if changed == text {
				t.Fatal("the text was not changed")
			}
			s.Dumps = dumps(t, xtables.IPv4, changed)
		}
	}
	foreign := func(rules string) func(*testing.T, *check.State, string) {
		return edit(func(text string) string { return text + rules })
	}
	for _, c := range []struct {
		name, code, says string
		do               func(*testing.T, *check.State, string)
	}{
		{"ip_forward", "ip-forward", "0", func(_ *testing.T, s *check.State, _ string) { s.Sysctls["net/ipv4/ip_forward"] = "0" }},
		{"rp_filter", "rp-filter", "strict", func(_ *testing.T, s *check.State, _ string) { s.Sysctls["net/ipv4/conf/all/rp_filter"] = "1" }},
		{"bridge", "bridge-nf-call", "cni0", func(_ *testing.T, s *check.State, _ string) {
			s.Bridges, s.Sysctls["net/bridge/bridge-nf-call-iptables"] = []string{"cni0"}, "0"
		}},
		{"full", "conntrack-full", "99 of 100", func(_ *testing.T, s *check.State, _ string) { s.Counters.Entries = 99 }},
		{"near full", "conntrack-near-full", "85 %", func(_ *testing.T, s *check.State, _ string) { s.Counters.Entries = 85 }},
		{"clash", "conntrack-clash", "7 first packets", func(_ *testing.T, s *check.State, _ string) { s.Counters.InsertFailed = 7 }},
		{"ipvs too", "two-proxies", "3 virtual servers", func(_ *testing.T, s *check.State, _ string) { s.VirtualServers = 3 }},
		{"direct routing", "not-nat", "10.244.1.2:8080 by direct routing", func(_ *testing.T, s *check.State, _ string) {
			at := netip.MustParseAddrPort
			s.Balanced = []check.Balanced{
				{Proto: conntrack.TCP, Virtual: at("10.96.0.10:80"), Server: at("10.244.1.1:8080"), Forwarding: trace.ForwardNAT},
				{Proto: conntrack.TCP, Virtual: at("10.96.0.10:80"), Server: at("10.244.1.2:8080"), Forwarding: trace.ForwardDirect},
			}
		}},
		{"nftables too", "two-proxies", "nf_tables", func(_ *testing.T, s *check.State, _ string) { s.NFTables = []string{"ip kube-proxy"} }},
		{"kube-ipvs0", "mode-leftover", "another mode", func(_ *testing.T, s *check.State, _ string) { s.Links = []string{"lo", "kube-ipvs0"} }},
		{"other flavour", "both-flavours", "iptables-legacy", func(t *testing.T, s *check.State, text string) {
			d := dumps(t, xtables.IPv4, text)
			d[0].Flavour = xtables.Legacy
			s.Dumps = append(s.Dumps, d...)
		}},
		{"docker", "forward-dropped", "policy DROP of FORWARD", foreign("*filter\n:FORWARD DROP [0:0]\nCOMMIT\n")},
		{"docker by name", "forward-dropped", "policy DROP of FORWARD (Docker)", foreign("*filter\n:FORWARD DROP [0:0]\n:DOCKER-USER - [0:0]\n-A FORWARD -i docker0 -j DOCKER-USER\nCOMMIT\n")},
		{"firewalld", "forward-dropped", "firewalld", foreign("*filter\n:FWDI_public - [0:0]\n-A FORWARD -j FWDI_public\n-A FWDI_public -j REJECT --reject-with icmp-host-prohibited\nCOMMIT\n")},
		{"policy chain", "foreign-drop", "NetworkPolicy (Calico)", foreign("*filter\n:cali-tw-x - [0:0]\n-A FORWARD -m set --match-set cali40 dst -j cali-tw-x\n-A cali-tw-x -j DROP\nCOMMIT\n")},
		{"hostPort", "nodeport-shadowed", "Docker", foreign("*nat\n:DOCKER - [0:0]\n-I PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n-A DOCKER -p tcp -m tcp --dport 30080 -j DNAT --to-destination 172.17.0.2:80\nCOMMIT\n")},
		{"notrack", "not-tracked", "raw/PREROUTING", foreign("*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -d 10.96.0.10/32 -j NOTRACK\nCOMMIT\n")},
		{"NodeLocal", "not-tracked", "NodeLocal DNSCache", foreign("*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -d 10.96.0.10/32 -m comment --comment \"NodeLocal DNS Cache: skip conntrack\" -j NOTRACK\nCOMMIT\n")},
		{"mark", "mark-overlap", "(Calico) sets the bit 0x4000", foreign("*mangle\n:cali-PREROUTING - [0:0]\n-A cali-PREROUTING -j MARK --set-xmark 0xc000/0xf000\nCOMMIT\n")},
		{"mark cleared", "mark-overlap", "clears the bit 0x4000", foreign("*mangle\n-A FORWARD -i eth0 -j MARK --set-xmark 0x10000/0xffffffff\nCOMMIT\n")},
		{"connmark", "mark-overlap", "restores from the connection's mark the bit 0x4000", foreign("*mangle\n-A PREROUTING -p udp -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff\nCOMMIT\n")},
		{"drop mark", "mark-overlap", "0x8000 of packets' marks, by which rules of a kube-proxy drop", foreign("*filter\n:KUBE-FIREWALL - [0:0]\n-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP\nCOMMIT\n*mangle\n-A FORWARD -j MARK --set-xmark 0x8000/0x8000\nCOMMIT\n")},
		{"group shared", "nflog-shared", "rule 1 (NetworkPolicy (Calico)) reports to NFLOG group 100", foreign("*filter\n:cali-fw-x - [0:0]\n-A cali-fw-x -j NFLOG --nflog-group 100 --nflog-prefix DPI\nCOMMIT\n")},
		{"group held", "nflog-held", "ulogd (process 7) holds NFLOG group 100", func(_ *testing.T, s *check.State, _ string) {
			s.PID = 8
			s.Listeners = []check.Listener{{Group: 100, PID: 7, Command: "ulogd"}}
		}},
		{"eBPF", "handled-elsewhere", "Cilium handles Services (eBPF program cil_sock4_conne)", func(_ *testing.T, s *check.State, _ string) {
			s.Planes = []dataplane.Sign{{Who: "Cilium", What: "eBPF program cil_sock4_conne", Sure: true}}
		}},
		{"mesh", "handled-elsewhere", "Istio", foreign("*nat\n:ISTIO_OUTPUT - [0:0]\n-A OUTPUT -p tcp -j ISTIO_OUTPUT\n-A ISTIO_OUTPUT -p tcp -j REDIRECT --to-ports 15001\nCOMMIT\n")},
		{"offload", "flow-offload", "neither FIN nor RST", func(_ *testing.T, s *check.State, _ string) { s.Flowtables = []string{"inet fw/ft"} }},
		{"no entry", "entry-missing", "KUBE-SERVICES", edit(func(s string) string {
			return strings.Replace(s, `-I PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES`, "-N x", 1)
		})},
		{"no masquerade", "masquerade-missing", "MASQUERADE", edit(func(s string) string {
			return strings.Replace(s, "-j MASQUERADE --random-fully", "-j RETURN", 1)
		})},
		{"endpoint gone", "endpoint-gone", "the API does not have it", func(_ *testing.T, s *check.State, _ string) {
			withEndpoints(s, web, func(e []proxy.Endpoint) []proxy.Endpoint { return e[1:] })
		}},
		{"endpoint new", "endpoint-missing", "10.244.9.9:8080", func(_ *testing.T, s *check.State, _ string) {
			withEndpoints(s, web, func(e []proxy.Endpoint) []proxy.Endpoint {
				return append(slices.Clone(e), proxy.Endpoint{Addr: netip.MustParseAddrPort("10.244.9.9:8080"), Ready: true, Serving: true})
			})
		}},
		{"none left", "service-not-refused", "the API has no endpoint", func(_ *testing.T, s *check.State, _ string) {
			withEndpoints(s, web, func([]proxy.Endpoint) []proxy.Endpoint { return nil })
		}},
		{"service gone", "service-extra", "the API does not have it", func(_ *testing.T, s *check.State, _ string) {
			snap := *s.Snapshot
			snap.Services = slices.DeleteFunc(slices.Clone(snap.Services), func(x proxy.Service) bool { return x.Name == web })
			s.Snapshot = &snap
		}},
		{"service new", "service-missing", "10.96.7.7", func(_ *testing.T, s *check.State, _ string) {
			snap := *s.Snapshot
			x := snap.Services[0]
			x.Name.Name, x.ClusterIP, x.NodePort = "new", netip.MustParseAddr("10.96.7.7"), 0
			x.Endpoints = []proxy.Endpoint{{Addr: netip.MustParseAddrPort("10.244.9.9:8080"), Ready: true, Serving: true}}
			snap.Services = append(slices.Clone(snap.Services), x)
			s.Snapshot = &snap
		}},
		{"stale", "conntrack-stale", "no endpoint any more", func(_ *testing.T, s *check.State, _ string) {
			dst, gone := netip.MustParseAddrPort("10.96.0.13:53"), netip.MustParseAddrPort("10.244.9.9:5353")
			src := netip.MustParseAddrPort("10.244.1.10:4000")
			s.Entries = []conntrack.Flow{{Orig: conntrack.NewTuple(conntrack.UDP, src, dst), Reply: conntrack.NewTuple(conntrack.UDP, gone, src)}}
		}},
		{"list full", "affinity-full", "100 clients", func(_ *testing.T, s *check.State, _ string) {
			s.Lists, s.ListMax = map[string]int{"KUBE-SEP-X": 100}, 100
		}},
		{"sync", "sync-failed", "no such file", func(_ *testing.T, s *check.State, _ string) { s.SyncError = "iptables-restore: no such file" }},
		{"behind", "rules-behind", "1m0s ago", func(_ *testing.T, s *check.State, _ string) { s.Wanted = s.Now.Add(-time.Minute) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, text := healthy(t, proxytest.Cases()[0].Setup)
			if c.code != "rule-altered" && c.code != "sync-failed" && c.code != "rules-behind" {
				s.Program = nil
			}
			c.do(t, s, text)
			found := check.Run(s, check.Options{})
			i := slices.IndexFunc(found, func(f check.Finding) bool { return f.Code == c.code })
			if i < 0 {
				t.Fatalf("no %s in %+v", c.code, found)
			}
			if all := fmt.Sprint(found[i]); !strings.Contains(all, c.says) {
				t.Errorf("%q does not say %q", all, c.says)
			}
			if rest := check.Run(s, check.Options{Ignore: []string{c.code + ":" + found[i].Object}}); slices.ContainsFunc(rest, func(f check.Finding) bool {
				return f.Code == c.code && f.Object == found[i].Object
			}) {
				t.Error("it was not ignored")
			}
		})
	}
}

// TestNeighboursInOrder wants nothing said of others that keep out of the way:
// marks of their own, NFLOG groups of their own, eBPF programs at devices beside a
// kube-proxy that serves.
func TestNeighboursInOrder(t *testing.T) {
	s, text := healthy(t, proxytest.Cases()[0].Setup)
	s.Program = nil
	s.Dumps = dumps(t, xtables.IPv4, text+`*mangle
:cali-PREROUTING - [0:0]
-A cali-PREROUTING -j MARK --set-xmark 0x10000/0xffff0000
-A PREROUTING -i eni+ -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80
-A PREROUTING -j CONNMARK --set-xmark 0x4000/0x4000
COMMIT
*filter
:cali-fw-x - [0:0]
-A cali-fw-x -j NFLOG --nflog-group 1 --nflog-prefix DPI
COMMIT
`)
	s.PID = 8
	s.Listeners = []check.Listener{{Group: 100, PID: 8, Command: "anything"}, {Group: 1, PID: 7, Command: "calico-node"}}
	s.Planes = []dataplane.Sign{{Who: "Cilium", What: "eBPF program cil_from_netdev at eth0"}}
	for _, f := range check.Run(s, check.Options{}) {
		t.Errorf("%+v", f)
	}
}

// withEndpoints changes a Service of the Snapshot, and not of the rules.
func withEndpoints(s *check.State, name proxy.PortName, f func([]proxy.Endpoint) []proxy.Endpoint) {
	snap := *s.Snapshot
	snap.Services = slices.Clone(snap.Services)
	for i := range snap.Services {
		if snap.Services[i].Name == name {
			snap.Services[i].Endpoints = f(snap.Services[i].Endpoints)
		}
	}
	s.Snapshot = &snap
}

// TestStaleInUserspaceMode: there entries lead to ports of the proxy, and only
// those that lead elsewhere are stale.
func TestStaleInUserspaceMode(t *testing.T) {
	src, dst := netip.MustParseAddrPort("10.244.1.10:4000"), netip.MustParseAddrPort("10.96.0.13:53")
	port, gone := netip.MustParseAddrPort("192.0.2.1:34567"), netip.MustParseAddrPort("192.0.2.1:34568")
	at := func(to netip.AddrPort) []conntrack.Flow {
		return []conntrack.Flow{{Orig: conntrack.NewTuple(conntrack.UDP, src, dst), Reply: conntrack.NewTuple(conntrack.UDP, to, src)}}
	}
	frontends := conntrack.Frontends{dst: conntrack.Backends{port: {}}}
	rules := dumps(t, xtables.IPv4, "*nat\n:KUBE-PORTALS-CONTAINER - [0:0]\n-A KUBE-PORTALS-CONTAINER -d 10.96.0.13/32 -p udp -m udp --dport 53 -j DNAT --to-destination 192.0.2.1:34567\nCOMMIT\n")
	for _, c := range []struct {
		name      string
		frontends conntrack.Frontends
		entries   []conntrack.Flow
		stale     bool
	}{
		{"to the proxy's port", frontends, at(port), false},
		{"to a port that is gone", frontends, at(gone), true},
		{"of another proxy", nil, at(port), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &check.State{Snapshot: proxytest.Cases()[0].Setup.Snapshot, Dumps: rules, Entries: c.entries, Frontends: c.frontends}
			got := slices.ContainsFunc(check.Run(s, check.Options{}), func(f check.Finding) bool { return f.Code == "conntrack-stale" })
			if got != c.stale {
				t.Errorf("stale is %v, want %v", got, c.stale)
			}
		})
	}
}

func TestIgnoreUnknown(t *testing.T) {
	if err := (&check.Options{Ignore: []string{"odds-*", "rp-filter:net*"}}).Validate(); err != nil {
		t.Error(err)
	}
	if err := (&check.Options{Ignore: []string{"no-such-thing"}}).Validate(); err == nil || !strings.Contains(err.Error(), "list-codes") {
		t.Errorf("got %v", err)
	}
}

// TestCodesInDocs keeps the table of docs/check.md what Codes says.
func TestCodesInDocs(t *testing.T) {
	b, err := os.ReadFile("../../docs/check.md")
	if err != nil {
		t.Fatal(err)
	}
	want := "<!-- codes:begin -->\n| code | severity | meaning |\n|---|---|---|\n"
	for _, c := range check.Codes() {
		want += fmt.Sprintf("| `%s` | %s | %s |\n", c.Name, c.Severity, c.Meaning)
	}
	if want += "<!-- codes:end -->"; !strings.Contains(string(b), want) {
		t.Errorf("docs/check.md must hold\n%s", want)
	}
}

package main

import (
	"bytes"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/proxy/liverules/nftables"
	"github.com/kptrace/kptrace/trace/check"
)

// What nft list ruleset printed on a node of an upstream kube-proxy 1.36 in nftables
// mode, and what its API server had (test/e2e, TestExplainUpstreamNFTables, writes both).
const (
	nftRules = "testdata/upstream/upstream-nftables.rules"
	nftState = "testdata/upstream/nftables-state"
)

// nftNode is that node: its rules and what the API says.
type nftNode struct {
	text     string
	snapshot *proxy.Snapshot
}

// newNFTNode is that node, with its table of IPv4 alone.
func newNFTNode(t *testing.T) *nftNode {
	t.Helper()
	text, err := os.ReadFile(nftRules)
	if err != nil {
		t.Fatal(err)
	}
	s, err := (&rulesFlags{manifests: nftState, node: "node1"}).snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Services) < 100 {
		t.Fatalf("only %d Services", len(s.Services))
	}
	four, six, ok := strings.Cut(string(text), "table ip6 kube-proxy {")
	if !ok || !strings.HasPrefix(four, "table ip kube-proxy {") || len(six) < len(four)/2 {
		t.Fatal("the listing does not have both tables, IPv4 first")
	}
	return &nftNode{four, s}
}

// state is what a check gets, of other rules and with rules of iptables beside them.
func (n *nftNode) state(t *testing.T, text, iptables string) *check.State {
	t.Helper()
	s := &check.State{Node: "node1", Snapshot: n.snapshot, Addrs: n.snapshot.Node.Addrs, Now: time.Now()}
	cfg := nftables.Config{Addrs: s.Addrs, Others: true}
	if iptables != "" {
		rs, err := xtables.Parse(xtables.IPv4, iptables)
		if err != nil {
			t.Fatal(err)
		}
		s.Dumps = []xtables.Dump{{Family: xtables.IPv4, Rules: rs}}
		cfg.Beside = liverules.New(liverules.Config{Addrs: s.Addrs}, rs)
	}
	var err error
	if s.NFT, err = nftables.Parse(cfg, text); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestCheckNFTQuiet wants nothing said of a healthy node: with the API's state and
// without, and beside tables of others that do no harm.
func TestCheckNFTQuiet(t *testing.T) {
	for _, args := range [][]string{nil, {"--manifests", nftState, "--node", "node1"}, {"--manifests", nftState, "--node", "node1", "--node-ip", "127.0.0.1,198.51.100.1,fd00:2::1,192.0.2.1,fd00:1::1"}} {
		text, err := os.ReadFile(nftRules)
		if err != nil {
			t.Fatal(err)
		}
		for name, more := range map[string]string{"alone": "", "others": firewalld + harmless} {
			var out, talk bytes.Buffer
			if code := run(append([]string{"check", "--rules", "-"}, args...), strings.NewReader(string(text)+more), &out, &talk); code != 0 || out.Len() > 0 {
				t.Errorf("%v, %s: exit %d: %s%s", args, name, code, &out, &talk)
			}
		}
	}
}

// firewalld is what firewalld writes, cut down: what is translated is accepted, what
// else is forwarded is refused.
const firewalld = `
table inet firewalld {
	ct helper helper-ftp-tcp {
		type "ftp" protocol tcp
		l3proto inet
	}

	chain mangle_PREROUTING {
		type filter hook prerouting priority mangle + 10; policy accept;
		jump mangle_PREROUTING_ZONES
	}

	chain mangle_PREROUTING_ZONES {
		iifname "eth0" goto mangle_PRE_public
		goto mangle_PRE_public
	}

	chain mangle_PRE_public {
		return
	}

	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state invalid drop
		reject with icmpx admin-prohibited
	}

	chain filter_FORWARD {
		type filter hook forward priority filter + 10; policy accept;
		ct state established,related accept
		ct status dnat accept
		iifname "lo" accept
		ct state vmap { invalid : drop }
		ip6 daddr { ::/96, 2002::/24 } reject with icmpv6 addr-unreachable
		reject with icmpx admin-prohibited
	}
}
`

const harmless = `
table inet mine {
	flowtable ft {
		hook ingress priority filter
		devices = { eth0 }
	}

	counter seen {
		packets 3 bytes 180
	}

	chain input {
		type filter hook input priority filter; policy drop;
		ct state established,related accept
		tcp dport { 22, 30000-32767 } counter packets 0 bytes 0 accept
		udp dport 30000-32767 log prefix "np: " level info accept
		sctp dport 30000-32767 accept
		icmp type echo-request accept
	}

	chain out {
		type nat hook postrouting priority srcnat + 5; policy accept;
		ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade
	}
}
table ip asleep {
	flags dormant
	chain forward {
		type filter hook forward priority filter; policy drop;
	}
}
table netdev x {
	chain in {
		type filter hook ingress device "eth0" priority 0; policy accept;
		ip daddr 10.96.0.1 drop
	}
}
`

// TestCheckNFTFindings breaks one thing after the other in real rules, and wants it
// called by its name, at its object.
func TestCheckNFTFindings(t *testing.T) {
	n := newNFTNode(t)
	ip := func(name string) string {
		i := slices.IndexFunc(n.snapshot.Services, func(s proxy.Service) bool { return s.Name.Name == name && !s.Is6() })
		return n.snapshot.Services[i].ClusterIP.String()
	}
	line := func(with ...string) string {
		for l := range strings.Lines(n.text) {
			if !slices.ContainsFunc(with, func(w string) bool { return !strings.Contains(l, w) }) {
				return strings.TrimSuffix(l, "\n")
			}
		}
		t.Fatalf("no line with %q", with)
		return ""
	}
	// in changes text in a chain's, set's or map's body.
	in := func(object, old, instead string) func(string) string {
		return func(s string) string {
			at := strings.Index(s, object+" {\n")
			if at < 0 {
				t.Fatalf("no %s", object)
			}
			end := at + strings.Index(s[at:], "\n\t}\n")
			return s[:at] + strings.Replace(s[at:end], old, instead, 1) + s[end:]
		}
	}
	replace := func(old, instead string) func(string) string {
		return func(s string) string { return strings.Replace(s, old, instead, 1) }
	}
	// element is one of a map, without what stands around it.
	element := func(with ...string) string {
		l := strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line(with...)), "elements = { "))
		return strings.TrimSuffix(strings.TrimSuffix(l, ","), " }")
	}
	without := func(with ...string) func(string) string { return replace(element(with...), "") }
	more := func(text string) func(string) string { return func(s string) string { return s + text } }
	chainOf := func(kind, service string) string {
		_, rest, _ := strings.Cut(line("\tchain "+kind+"-", "-"+service+" {"), "chain ")
		return strings.TrimSuffix(rest, " {")
	}
	port := strings.Fields(element("tcp . 3", ": goto external-", "shop/nodeport/tcp/http"))[2]
	one, kept, local := chainOf("service", "shop/one/tcp/http"), chainOf("service", "shop/affinity/tcp/http"), chainOf("external", "shop/external-local/tcp/http")
	third := strings.TrimSuffix(strings.TrimPrefix(line("\tchain endpoint-", "shop/affinity/tcp/http__10.244.2.12/8080"), "\tchain "), " {")
	forward := func(rules string) func(string) string {
		return more("table ip guard {\n\tchain forward {\n\t\ttype filter hook forward priority filter; policy accept;\n" + rules + "\n\t}\n}\n")
	}
	for _, c := range []struct {
		name, code, object, says string
		severity                 check.Severity
		change                   func(string) string
		iptables                 string
	}{
		{"an element of the Services", "service-missing", "shop/one:http", "no rule for its ClusterIP " + ip("one"), check.Breaks,
			without(" : goto " + one), ""},
		{"a node port", "service-missing", "shop/nodeport:dns", "node port", check.Breaks, without("udp . 3", ": goto external-", "shop/nodeport/udp/dns"), ""},
		{"the modulus of a map", "odds-missing", "shop/clusterip:http", "25.0 % of connections", check.Breaks,
			in(chainOf("service", "shop/clusterip/tcp/http"), "mod 3", "mod 4"), ""},
		{"the modulus of a vmap", "odds-missing", "shop/affinity:http", "25.0 % of connections", check.Breaks, in(kept, "mod 3", "mod 4"), ""},
		{"a modulus too small", "endpoint-missing", "shop/clusterip:http", "10.244.2.12:8080 gets no connection", check.Risk, in(chainOf("service", "shop/clusterip/tcp/http"), "mod 3", "mod 2"), ""},
		{"odds of two", "odds-uneven", "shop/clusterip:http", "66.7 %", check.Risk,
			in(chainOf("service", "shop/clusterip/tcp/http"), "2 : 10.244.2.12", "2 : 10.244.2.11"), ""},
		{"an endpoint's chain is empty", "odds-missing", "shop/affinity:http", "33.3 %", check.Breaks, in(third, "dnat to", "log prefix"), ""},
		{"an endpoint's chain is gone", "target-missing", "kube-proxy/" + kept, third, check.Breaks, replace("chain "+third, "chain x"+third), ""},
		{"an endpoint of others", "endpoint-gone", "shop/one:http", "10.244.2.99:8080, and the API does not have it", check.Breaks, in(one, "10.244.2.10", "10.244.2.99"), ""},
		{"a DNAT to another than its name", "rule-altered", "kube-proxy/" + third, "rule 2", check.Risk, in(third, "dnat to 10.244.2.12", "dnat to 10.244.2.11"), ""},
		{"a Service too many", "service-extra", "shop/one:http", "10.96.9.9", check.Risk, replace(element(" : goto "+one), "10.96.9.9 . tcp . 80 : goto "+one+", "+element(" : goto "+one)), ""},
		{"a cluster IP too many", "element-extra", "kube-proxy/cluster-ips", "10.96.9.9", check.Risk, in("set cluster-ips", "10.96.0.1,", "10.96.0.1, 10.96.9.9,"), ""},
		{"a cluster IP too few", "element-missing", "kube-proxy/cluster-ips", "of shop/one:http", check.Risk, in("set cluster-ips", " "+ip("one")+",", " "), ""},
		{"nothing refuses", "element-missing", "shop/none:http", "nothing refuses its ClusterIP", check.Risk,
			without(ip("none")+" . tcp", `comment "shop/none:http"`), ""},
		{"a Service with endpoints refused", "service-refused", "shop/one:http", "the rules refuse", check.Breaks,
			replace("map no-endpoint-services {\n", "map no-endpoint-services {\n elements = { "+ip("one")+" . tcp . 80 comment \"shop/one:http\" : goto reject-chain }\n"), ""},
		{"the lookup", "entry-missing", "kube-proxy/prerouting", "do not get to", check.Breaks, in("chain services", "ip daddr . meta l4proto . th dport vmap @service-ips", "counter"), ""},
		{"the hook", "entry-missing", "kube-proxy/output", "that the node itself sends", check.Breaks, in("chain nat-output", "jump services", "counter"), ""},
		{"the mark of clients outside", "masquerade-missing", "shop/nodeport:http", "keep their source", check.Breaks,
			in(chainOf("external", "shop/nodeport/tcp/http"), "\t\tmeta mark set meta mark | 0x00004000 comment \"masquerade\"\n", ""), ""},
		{"the masquerade", "masquerade-missing", "", "keep their source", check.Breaks, in("chain masquerading", " masquerade fully-random", " counter"), ""},
		{"the hairpin", "masquerade-missing", "shop/clusterip:http", "reaches itself", check.Breaks, in("set hairpin-connections", "10.244.2.12 . 10.244.2.12 . tcp . 8080,", ""), ""},
		{"affinity is not remembered", "affinity-wrong", "shop/affinity:http", "10.244.2.12:8080", check.Risk, in(third, "\t\tupdate @", "\t\tcounter #"), ""},
		{"affinity is too short", "affinity-wrong", "shop/affinity:http", "3h0m0s", check.Risk, in("set affinity-"+strings.TrimPrefix(third, "endpoint-"), "3h", "3m"), ""},
		{"the short way of pods", "shortcut-missing", "shop/external-local:http", "from pods", check.Risk, in(local, "ip saddr 10.244.0.0/16 goto", "ip saddr 10.245.0.0/16 goto"), ""},
		{"a source range", "ranges-wrong", "shop/ranges:http", "refuse 203.0.113.0", check.Breaks, in(chainOf("firewall", "shop/ranges/tcp/http"), "203.0.113.0/24", "203.0.114.0/24"), ""},
		{"no source ranges", "ranges-wrong", "shop/ranges:http", "outside the Service's source ranges", check.Risk, replace("198.18.0.10 . tcp . 80 : goto firewall-", "198.18.0.99 . tcp . 80 : goto firewall-"), ""},
		{"a rule of somebody's in its table", "rule-altered", "kube-proxy/nat-prerouting", "rule 1 is none that a kube-proxy writes", check.Risk, in("chain nat-prerouting", "\t\tjump services", "\t\ttcp dport 80 accept\n\t\tjump services"), ""},
		{"a rule that is not understood", "rule-altered", "kube-proxy", "could not be evaluated", check.Risk, in("chain services", "\t\tip daddr .", "\t\tsocket transparent 1 counter\n\t\tip daddr ."), ""},

		{"a rule of others drops", "forward-dropped", "shop/one:http", "rule 2 of guard/forward drops", check.Breaks, forward("\t\tct state established accept\n\t\ttcp dport 8080 counter packets 1 bytes 2 drop"), ""},
		{"a policy of others drops", "forward-dropped", "fw/forward", "the policy of fw/forward drops", check.Breaks,
			more("table inet fw {\n\tchain forward {\n\t\ttype filter hook forward priority filter; policy drop;\n\t\tct state established,related accept\n\t}\n}\n"), ""},
		{"a policy that may drop", "forward-policy", "fw/forward", "depends on what could not be evaluated", check.Note,
			more("table inet fw {\n\tchain forward {\n\t\ttype filter hook forward priority filter; policy drop;\n\t\toifname \"cni0\" accept\n\t}\n}\n"), ""},
		{"firewalld without what is translated", "forward-dropped", "shop/one:http", "(firewalld) drops", check.Breaks, more(strings.Replace(firewalld, "\t\tct status dnat accept\n\t\tiifname \"lo\" accept\n\t\tct state vmap", "\t\tct state vmap", 1)), ""},
		{"not tracked", "not-tracked", "shop/one:http", "rule 1 of dns/pre", check.Breaks, more("table inet dns {\n\tchain pre {\n\t\ttype filter hook prerouting priority raw; policy accept;\n\t\tip daddr " + ip("one") + " notrack\n\t}\n}\n"), ""},
		{"a node port taken", "nodeport-shadowed", "shop/nodeport:http", "rule 1 of docker-bridges/nat (Docker), which sends it to 172.17.0.2:80", check.Breaks,
			more("table ip docker-bridges {\n\tchain nat {\n\t\ttype nat hook prerouting priority dstnat - 5; policy accept;\n\t\tfib daddr type local tcp dport " + port + " counter packets 0 bytes 0 dnat to 172.17.0.2:80\n\t}\n}\n"), ""},
		{"iptables mode beside it", "two-proxies", "nftables", "ip nat", check.Breaks,
			more("table ip nat {\n\tchain PREROUTING {\n\t\ttype nat hook prerouting priority dstnat; policy accept;\n\t\tcounter packets 1 bytes 60 jump KUBE-SERVICES\n\t}\n\n\tchain KUBE-SERVICES {\n\t}\n}\n"), ""},

		{"Docker's policy", "forward-dropped", "filter/FORWARD", "(Docker)", check.Breaks, nil, "*filter\n:FORWARD DROP [0:0]\n:DOCKER-USER - [0:0]\n-A FORWARD -j DOCKER-USER\nCOMMIT\n"},
		{"Calico's rule", "forward-dropped", "shop/one:http", "(NetworkPolicy (Calico))", check.Breaks, nil, "*filter\n:FORWARD ACCEPT [0:0]\n:cali-tw-x - [0:0]\n-A FORWARD -j cali-tw-x\n-A cali-tw-x -p tcp -j DROP\nCOMMIT\n"},
		{"NodeLocal", "not-tracked", "shop/one:http", "NodeLocal DNSCache", check.Note, nil, "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -d " + ip("one") + "/32 -m comment --comment \"NodeLocal DNS Cache: skip conntrack\" -j NOTRACK\nCOMMIT\n"},
		{"two proxies", "two-proxies", "nftables", "in iptables", check.Breaks, nil, "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j KUBE-SERVICES\n-A KUBE-SERVICES -d 10.96.0.1/32 -j RETURN\nCOMMIT\n"},
		{"what iptables mode left", "mode-leftover", "", "left by another mode", check.Risk, nil, "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]\n-A KUBE-SERVICES -d 10.96.0.1/32 -j KUBE-SVC-AAAAAAAAAAAAAAAA\nCOMMIT\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := n.text
			if c.change != nil {
				if text = c.change(text); text == n.text {
					t.Fatal("nothing was changed")
				}
			}
			found := check.Run(n.state(t, text, c.iptables), check.Options{})
			i := slices.IndexFunc(found, func(f check.Finding) bool {
				return f.Code == c.code && (f.Object == c.object || c.object == "") && strings.Contains(f.Message, c.says) && f.Severity == c.severity
			})
			if i < 0 {
				t.Fatalf("no %s %s %s with %q in\n%s", c.severity, c.code, c.object, c.says, list(found))
			}
			if c.severity == check.Breaks && !check.Broken(found) {
				t.Error("it is not said to break anything")
			}
			if c.iptables == "" {
				return
			}
			if rest := check.Run(n.state(t, text, c.iptables), check.Options{Ignore: []string{c.code + ":" + found[i].Object}}); len(rest) >= len(found) {
				t.Error("it was not ignored")
			}
		})
	}
}

func list(found []check.Finding) string {
	var b strings.Builder
	for i := range found {
		f := &found[i]
		b.WriteString(string(f.Severity) + " " + f.Code + " " + f.Object + ": " + f.Message + "\n")
	}
	return b.String()
}

// TestCheckNFTEvery takes elements, rules, chains and parts of them away, one at a time,
// and wants each noticed: of the table of one family every kind in each object.
func TestCheckNFTEvery(t *testing.T) {
	n := newNFTNode(t)
	lines := strings.Split(n.text, "\n")
	tried, missed, object, last := 0, 0, "", map[string]int{}
	for i, l := range lines {
		w := strings.Fields(l)
		switch {
		case len(w) == 3 && w[2] == "{" && slices.Contains([]string{"set", "map", "chain"}, w[0]):
			object = w[0] + " " + w[1]
			continue
		case object == "" || len(w) < 2 || strings.HasPrefix(object, "table") || slices.Contains([]string{"type", "comment", "size", "flags", "timeout"}, w[0]):
			continue
		}
		if strings.Contains(l, "Drop traffic to unallocated ClusterIPs") {
			continue // which ranges of addresses Services have is not known
		}
		// One of each shape of an object's lines is enough: of maps some.
		shape, _, _ := strings.Cut(object, "-")
		if strings.HasPrefix(object, "chain ") {
			shape += " " + w[0]
		} else {
			shape = object
		}
		if last[shape]++; last[shape] > 2 && i%60 != 0 {
			continue
		}
		for how, instead := range wrongLines(object, l) {
			changed := slices.Clone(lines)
			changed[i] = instead
			s := n.state(t, strings.Join(changed, "\n"), "")
			tried++
			if found := check.Run(s, check.Options{}); len(found) == 0 {
				missed++
				t.Errorf("%s and not noticed, in %s: %s", how, object, l)
			}
		}
	}
	if tried < 60 {
		t.Errorf("only %d were tried", tried)
	}
	t.Logf("%d changes, %d not noticed", tried, missed)
}

// wrongLines are ways in which a line of a listing can be wrong.
func wrongLines(object, l string) map[string]string {
	trimmed := strings.TrimSpace(l)
	if !strings.HasPrefix(object, "chain ") { // elements
		body := strings.TrimPrefix(trimmed, "elements = { ")
		if body != trimmed || strings.HasSuffix(body, "}") {
			return nil // ends of a list
		}
		wrong := map[string]string{"deleted": ""}
		if strings.Contains(body, " . 80 ") {
			wrong["another port"] = strings.Replace(l, " . 80 ", " . 81 ", 1)
		}
		return wrong
	}
	wrong := map[string]string{}
	if !strings.Contains(object, "firewall-check") || !strings.Contains(l, "type ") {
		wrong["deleted"] = ""
	}
	for old, instead := range map[string]string{" mod ": " mod 1", "dnat to 10.": "dnat to 11.", ": 10.244": ": 10.245", " . 8080": " . 8081", ":8080": ":8081"} {
		if strings.Contains(l, old) {
			wrong[old] = strings.Replace(l, old, instead, 1)
		}
	}
	return wrong
}

// TestCheckNFTAddresses wants a node port on an address that no set names to be noticed
// where the node's addresses are known.
func TestCheckNFTAddresses(t *testing.T) {
	n := newNFTNode(t)
	s := n.state(t, strings.Replace(n.text, "elements = { 192.0.2.1 }", "", 1), "")
	s.Addrs = []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	if found := check.Run(s, check.Options{}); !slices.ContainsFunc(found, func(f check.Finding) bool {
		return f.Code == "element-missing" && f.Object == "kube-proxy/nodeport-ips"
	}) {
		t.Errorf("found %s", list(found))
	}
}

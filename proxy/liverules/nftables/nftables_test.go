package nftables

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
)

// upstream is what nft list ruleset printed on a node of an upstream kube-proxy 1.36
// in nftables mode (test/e2e, TestExplainUpstreamNFTables, writes it).
func upstream(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("../../../cmd/kptrace/testdata/upstream/upstream-nftables.rules")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func find(t *testing.T, p *Program, name string, six bool) *liverules.Service {
	t.Helper()
	for _, s := range p.Services() {
		if s.Name.String() == name && s.IP6 == six {
			return s
		}
	}
	t.Fatalf("no Service %s", name)
	return nil
}

func TestUpstream(t *testing.T) {
	t.Parallel()
	p, err := Parse(Config{Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}, upstream(t))
	if err != nil {
		t.Fatal(err)
	}
	if p.Mode() != proxy.NFTables || len(p.Services()) != 145 || p.Others() != 0 || len(p.Unknown()) > 0 {
		t.Errorf("mode %s, %d Services, %d other tables, not understood: %v", p.Mode(), len(p.Services()), p.Others(), p.Unknown())
	}
	forwards := 0
	for _, s := range p.Services() {
		for i := range s.Fronts {
			f := &s.Fronts[i]
			sum := f.Missing
			for _, c := range f.Choices {
				sum += c.Probability
			}
			if f.Verdict == proxy.Forward {
				forwards++
				if f.Missing != 0 || sum < 0.99999 || sum > 1.00001 {
					t.Errorf("odds of %s at %v add up to %v, %v missing", s.Name, f, sum, f.Missing)
				}
			}
		}
	}
	if forwards < 100 {
		t.Errorf("only %d addresses lead to endpoints", forwards)
	}
	if s := find(t, p, "shop/affinity:http", false); s.Affinity.Hours() != 3 || len(s.Fronts[0].Choices) != 3 {
		t.Errorf("affinity: %+v", s)
	}
	if s := find(t, p, "shop/ranges:http", false); len(s.Ranges) == 0 || s.Fronts[1].Via != proxy.ViaLoadBalancer {
		t.Errorf("ranges: %+v", s)
	}

	walk := func(src, dst string) proxy.Outcome {
		return p.Walk(proxy.Packet{Proto: conntrack.TCP, Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst), FromNode: strings.HasPrefix(src, "192.0.2.1:")})
	}
	front := find(t, p, "shop/affinity:http", false).Fronts[0]
	to := netip.AddrPortFrom(front.Addr, front.Port).String()
	one := front.Choices[1].Endpoint // on this node
	o := walk(one.Addr().String()+":40000", to)
	if o.Verdict != proxy.Forward || o.Via != proxy.ViaClusterIP || len(o.Choices) != 3 || o.Affinity.Hours() != 3 {
		t.Fatalf("outcome %v via %s, %d choices", o.Verdict, o.Via, len(o.Choices))
	}
	for _, c := range o.Choices {
		if want := map[bool]string{true: "hairpin"}[c.Endpoint == one]; c.Masquerade != want || len(c.Steps) < 6 {
			t.Errorf("to %v: masquerade %q, want %q, %d steps", c.Endpoint, c.Masquerade, want, len(c.Steps))
		}
	}
	if o := walk("203.0.113.9:40000", to); o.Verdict != proxy.Forward {
		t.Errorf("from outside: %v", o.Verdict)
	}
	if o := walk("10.244.1.77:40000", "10.96.255.254:9"); o.Verdict == proxy.Forward {
		t.Errorf("to an address of no Service: %v", o.Verdict)
	}
	if o := walk("192.0.2.99:40000", "198.18.0.10:80"); o.Verdict != proxy.Drop || o.Reason != "source-range" {
		t.Errorf("outside the source ranges: %v %s", o.Verdict, o.Reason)
	}
}

// TestWrongRules changes the rules as a fault would, and each time the odds tell.
func TestWrongRules(t *testing.T) {
	t.Parallel()
	text := upstream(t)
	parse := func(text string) *Program {
		p, err := Parse(Config{}, text)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	missing := func(p *Program) (n int) {
		for _, s := range p.Services() {
			for i := range s.Fronts {
				if s.Fronts[i].Missing > 0.1 || s.Fronts[i].Verdict == proxy.Pass {
					n++
				}
			}
		}
		return n
	}
	if n := missing(parse(text)); n != 0 {
		t.Fatalf("%d fronts lead nowhere as it is", n)
	}
	for name, change := range map[string]func(string) string{
		"a share too many": func(s string) string {
			return strings.Replace(s, "numgen random mod 2 map", "numgen random mod 3 map", 1)
		},
		"a vmap cut short": func(s string) string {
			return strings.ReplaceAll(s, "numgen random mod 3 vmap", "numgen random mod 4 vmap")
		},
		"a chain is empty":    func(s string) string { return strings.Replace(s, "dnat ip to", "log prefix", 1) },
		"a chain goes astray": func(s string) string { return strings.Replace(s, "\t\tgoto service-", "\t\tgoto servis-", 1) },
	} {
		changed := change(text)
		if changed == text {
			t.Fatalf("%s: nothing was changed", name)
		}
		if missing(parse(changed)) == 0 {
			t.Errorf("%s: nothing is missing", name)
		}
	}
}

func TestOtherText(t *testing.T) {
	t.Parallel()
	text := upstream(t)
	for name, c := range map[string]struct{ text, want string }{
		"JSON":      {`{"services": []}`, "nft -j list ruleset"},
		"iptables":  {"*nat\nCOMMIT\n", "where a table should begin"},
		"cut":       {text[:len(text)/2], "ends in the middle"},
		"two nodes": {text + text, "there twice"},
	} {
		if _, err := Parse(Config{}, c.text); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	p, err := Parse(Config{}, "table inet filter {\n\tchain x {\n\t\ttype filter hook input priority 0; policy drop;\n\t\tct state { established, related } accept\n\t}\n}\n")
	if err != nil || p.Mode() != "" || p.Others() != 1 || len(p.Services()) != 0 {
		t.Errorf("a table of others: %v, %+v", err, p)
	}
}

func FuzzParse(f *testing.F) {
	text := upstream(f)
	f.Add(text[:3000])
	f.Add("table ip kube-proxy {\n chain services { ip daddr . meta l4proto . th dport vmap @service-ips\n numgen random mod 0 vmap { 0 : goto a } } }")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := Parse(Config{}, s)
		if err != nil {
			return
		}
		p.Walk(proxy.Packet{Proto: conntrack.TCP, Src: netip.MustParseAddrPort("10.0.0.9:1"), Dst: netip.MustParseAddrPort("10.96.0.10:80")})
	})
}

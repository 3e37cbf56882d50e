package nftables

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// withHandles prints the captured rules as nft -a does, handles counting from 1.
func withHandles(t testing.TB) string {
	t.Helper()
	var b strings.Builder
	chain, list := false, false
	n := 0
	for line := range strings.Lines(upstream(t)) {
		line = strings.TrimSuffix(line, "\n")
		words := strings.Fields(line)
		switch {
		case strings.HasPrefix(line, "\tchain "), strings.HasPrefix(line, "table "), strings.HasSuffix(line, "{") && !chain:
			chain = chain || strings.HasPrefix(line, "\tchain ")
			n++
			line += fmt.Sprintf(" # handle %d", n)
		case line == "\t}":
			chain = false
		case !chain || len(words) == 0 || words[0] == "type" || words[0] == "comment":
		default:
			list = strings.Count(line, "{") > strings.Count(line, "}") || list && !strings.Contains(line, "}")
			if !list {
				n++
				line += fmt.Sprintf(" # handle %d", n)
			}
		}
		b.WriteString(line + "\n")
	}
	return b.String()
}

func TestList(t *testing.T) {
	t.Parallel()
	p, err := Parse(Config{}, upstream(t))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string][]Listed{}
	handles := map[uint64]bool{}
	for _, l := range List(withHandles(t)) {
		if l.Table != "kube-proxy" || handles[l.Handle] {
			t.Fatalf("rule %+v", l)
		}
		handles[l.Handle] = true
		got[l.Family+" "+l.Chain] = append(got[l.Family+" "+l.Chain], l)
	}
	rules := 0
	for _, table := range p.tables {
		family := map[bool]string{false: "ip", true: "ip6"}[table.six]
		for _, c := range table.chains {
			list := got[family+" "+c.name]
			if len(list) != len(c.rules) {
				t.Fatalf("chain %s %s has %d rules, listed are %+v", family, c.name, len(c.rules), list)
			}
			for i, l := range list {
				rules++
				if l.Number != uint64(i+1) || words(l.Text)[0] != c.rules[i].words[0] {
					t.Errorf("rule %d of %s is %+v, want %q", i, c.name, l, c.rules[i].text)
				}
			}
		}
	}
	if rules != len(handles) || rules < 300 {
		t.Errorf("%d rules, %d listed", rules, len(handles))
	}
}

// TestListOther takes other tables, lists over several lines, and text that is cut.
func TestListOther(t *testing.T) {
	t.Parallel()
	text := `table inet filter { # handle 3
	set s { # handle 9
		type ipv4_addr
		elements = { 1.2.3.4,
			     1.2.3.5 }
	}

	chain in { # handle 1
		type filter hook input priority filter; policy drop;
		tcp dport { 22, 80,
			    443 } accept comment "a # handle 7 of {" # handle 4
		drop # handle 5
	}
}
table ip x { # handle 4
	chain y { # handle 1
		drop # handle 2
`
	want := "[{inet filter in 4 1 tcp dport { 22, 80, 443 } accept comment \"a # handle 7 of {\"} {inet filter in 5 2 drop} {ip x y 2 1 drop}]"
	if got := fmt.Sprint(List(text)); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	for i := range text {
		List(text[:i])
	}
}

func TestMeaning(t *testing.T) {
	t.Parallel()
	name := func(a netip.AddrPort) string { return "pod " + a.String() }
	const end = "endpoint-ODHJZG6P-shop/a/tcp/http__10.244.2.10/8080"
	const svc = "service-JGENSEBX-shop/a/tcp/http"
	for _, c := range []struct{ chain, text, target, want, effect string }{
		{"nat-prerouting", "jump services", "services", "see whether it is for a Service", ""},
		{"services", "ip daddr . meta l4proto . th dport vmap @service-ips", svc, "cluster IP of shop/a:http", ""},
		{"services", "ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports", "external-JGENSEBX-shop/a/tcp/http", "outside address of shop/a:http", ""},
		{
			"services", `ip daddr @cluster-ips ip saddr != 10.244.0.0/16 meta mark set meta mark | 0x00004000 comment "masquerade clusterIP traffic from outside cluster"`, "",
			"masquerade clusterIP traffic from outside cluster", "",
		},
		{svc, "ip saddr @affinity-ODHJZG6P-shop/a/tcp/http__10.244.2.10/8080 goto " + end, end, "affinity: it was sent to pod 10.244.2.10:8080 before", ""},
		{svc, "numgen random mod 3 vmap { 0 : goto " + end + ", 1 : goto x, 2 : goto y }", end, "pick 1 of 3, p = 0.333: pod 10.244.2.10:8080", ""},
		{svc, "meta l4proto tcp dnat ip to numgen random mod 2 map { 0 : 10.244.2.10 . 8080, 1 : 10.244.2.11 . 8080 }", "", "pick 1 of 2, p = 0.500, and DNAT to it", "dnat"},
		{end, "update @affinity-ODHJZG6P-shop/a/tcp/http__10.244.2.10/8080 { ip saddr }", "", "affinity: remember that the client was sent to pod 10.244.2.10:8080", ""},
		{end, "meta l4proto tcp dnat to 10.244.2.10:8080", "", "DNAT to pod 10.244.2.10:8080", "dnat"},
		{"service-endpoints-check", "ip daddr . meta l4proto . th dport vmap @no-endpoint-services", "reject-chain", "its Service has no endpoints", ""},
		{"masquerading", "meta mark & 0x00004000 != 0x00000000 meta mark set meta mark ^ 0x00004000 masquerade fully-random", "", "replace its source by the node's address", "masquerade"},
		{
			"masquerading", "ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random", "",
			"masquerade it, for the client is the endpoint itself", "masquerade",
		},
		{"in", "ct status dnat accept", "", "", ""},
		{"in", "tcp dport 22 accept", "", "", ""},
	} {
		if got := Meaning(c.chain, c.text, c.target, name); got != c.want || Effect(c.text) != c.effect {
			t.Errorf("%s: %s: %q, want %q; does %q, want %q", c.chain, c.text, got, c.want, Effect(c.text), c.effect)
		}
	}
}

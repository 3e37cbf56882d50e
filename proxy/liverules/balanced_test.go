package liverules

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// TestBalanced walks what IPVS sends to an endpoint through the chains before it and
// behind it, and through none other.
func TestBalanced(t *testing.T) {
	to := netip.MustParseAddrPort("10.244.1.22:8080")
	virtual := netip.MustParseAddrPort("10.96.0.10:80")
	rules := func(table string, lines ...string) string {
		heads := map[string]string{
			"raw": "PREROUTING OUTPUT", "mangle": "PREROUTING INPUT FORWARD OUTPUT POSTROUTING",
			"nat": "PREROUTING INPUT OUTPUT POSTROUTING", "filter": "INPUT FORWARD OUTPUT",
		}
		text := "*" + table + "\n"
		for _, c := range strings.Fields(heads[table]) {
			text += ":" + c + " ACCEPT [0:0]\n"
		}
		return text + strings.Join(lines, "\n") + "\nCOMMIT\n"
	}
	for _, tc := range []struct {
		name, rules string
		fromNode    bool
		want        []string // verdict, reason, masqueraded or not
	}{
		{"nothing stops it", rules("filter", "-A FORWARD -j DROP"), false, []string{"forward"}},
		{"a rule before IPVS", rules("filter", "-A INPUT -d 10.96.0.10/32 -j DROP"), false, []string{"drop dropped-by-rule"}},
		{"behind it the destination is the endpoint", rules("filter", "-A OUTPUT -d 10.96.0.10/32 -j DROP"), false, []string{"forward"}},
		{"a rule behind it", rules("filter", "-A OUTPUT -d 10.244.1.22/32 -m conntrack --ctstate NEW -j REJECT"), false, []string{"reject dropped-by-rule"}},
		{"the policy of OUTPUT", strings.Replace(rules("filter", ""), ":OUTPUT ACCEPT", ":OUTPUT DROP", 1), false, []string{"drop policy-drop"}},
		{"raw of OUTPUT", rules("raw", "-A OUTPUT -p tcp -m tcp --dport 8080 -j DROP"), false, []string{"drop dropped-by-rule"}},
		{"nat is asked once", rules("nat", "-A OUTPUT -j DNAT --to-destination 10.244.1.99:80"), false, []string{"forward"}},
		{"nat asks behind it for a source", rules("nat", "-A POSTROUTING -d 10.244.1.22/32 -j MASQUERADE"), false, []string{"forward masqueraded"}},
		{"a mark is kept", rules("nat", "-A PREROUTING -d 10.96.0.10/32 -j MARK --set-xmark 0x4000/0x4000", "-A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE"), false, []string{"forward masqueraded"}},
		{"it goes out by the endpoint's device", rules("filter", "-A OUTPUT -o veth2 -j DROP"), false, []string{"drop dropped-by-rule"}},
		{"it is IPVS' own", rules("mangle", "-A PREROUTING -m ipvs --ipvs -j DROP", "-A INPUT -m ipvs ! --ipvs -j ACCEPT", "-A POSTROUTING -m ipvs --ipvs -j DROP"), false, []string{"drop dropped-by-rule"}},
		{"what cannot be known goes both ways", rules("filter", "-A INPUT -m ipvs --vaddr 10.96.0.10 -j DROP"), false, []string{"drop dropped-by-rule", "forward"}},
		{"another rule leads elsewhere", rules("nat", "-A PREROUTING -d 10.96.0.10/32 -p tcp -j DNAT --to-destination 10.244.1.99:80"), false, []string{"elsewhere"}},
		{"from the node", rules("filter", "-A OUTPUT -d 10.96.0.10/32 -j DROP", "-A INPUT -j DROP", "-A OUTPUT -d 10.244.1.22/32 -j REJECT"), true, []string{"reject dropped-by-rule"}},
		{"from the node, before IPVS", rules("nat", "-A OUTPUT -d 10.96.0.10/32 -p tcp -j DNAT --to-destination 10.244.1.99:80"), true, []string{"elsewhere"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			rs, err := xtables.Parse(xtables.IPv4, tc.rules)
			if err != nil {
				t.Fatal(err)
			}
			node := netip.MustParseAddr("10.244.1.1")
			p := New(Config{
				Addrs: []netip.Addr{node, virtual.Addr()},
				Route: func(p *xtables.Packet) {
					if p.Dst == to.Addr() {
						p.Out = "veth2"
					}
				},
			}, rs)
			pkt := proxy.Packet{Proto: conntrack.TCP, Src: netip.MustParseAddrPort("10.244.1.5:40000"), Dst: virtual, In: "veth1"}
			if tc.fromNode {
				pkt.Src, pkt.In, pkt.FromNode = netip.AddrPortFrom(node, 40000), "", true
			}
			var got []string
			for _, w := range p.Balanced(pkt, to) {
				text := w.Verdict.String()
				switch {
				case w.Endpoint != to:
					text = "elsewhere"
				case w.Verdict == proxy.Forward && w.Packet.Masqueraded:
					text += " masqueraded"
				case w.Reason != "":
					text += " " + w.Reason
				}
				got = append(got, text)
			}
			if strings.Join(got, "; ") != strings.Join(tc.want, "; ") {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
	if ways := New(Config{}).Balanced(proxy.Packet{Dst: virtual}, to); ways != nil {
		t.Errorf("without rules: %+v", ways)
	}
}

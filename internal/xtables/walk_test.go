package xtables

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// kubeNode is what iptables-save shows of a small node: a Service of three
// endpoints, one with affinity, a NodePort, one without endpoints.
const kubeNode = `*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SEP-A1 - [0:0]
:KUBE-SEP-A2 - [0:0]
:KUBE-SEP-A3 - [0:0]
:KUBE-SEP-S1 - [0:0]
:KUBE-SEP-S2 - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-A - [0:0]
:KUBE-SVC-S - [0:0]
:KUBE-EXT-A - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-NODEPORTS -p tcp -m comment --comment "shop/foo:http" -m tcp --dport 30080 -j KUBE-EXT-A
-A KUBE-EXT-A -m comment --comment "masquerade traffic for shop/foo:http external destinations" -j KUBE-MARK-MASQ
-A KUBE-EXT-A -j KUBE-SVC-A
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A KUBE-SEP-A1 -s 10.1.0.1/32 -m comment --comment "shop/foo:http" -j KUBE-MARK-MASQ
-A KUBE-SEP-A1 -p tcp -m comment --comment "shop/foo:http" -m tcp -j DNAT --to-destination 10.1.0.1:8080
-A KUBE-SEP-A2 -s 10.1.0.2/32 -m comment --comment "shop/foo:http" -j KUBE-MARK-MASQ
-A KUBE-SEP-A2 -p tcp -m comment --comment "shop/foo:http" -m tcp -j DNAT --to-destination 10.1.0.2:8080
-A KUBE-SEP-A3 -s 10.1.0.3/32 -m comment --comment "shop/foo:http" -j KUBE-MARK-MASQ
-A KUBE-SEP-A3 -p tcp -m comment --comment "shop/foo:http" -m tcp -j DNAT --to-destination 10.1.0.3:8080
-A KUBE-SEP-S1 -p udp -m recent --set --name KUBE-SEP-S1 --mask 255.255.255.255 --rsource -m udp -j DNAT --to-destination 10.1.1.1:53
-A KUBE-SEP-S2 -p udp -m recent --set --name KUBE-SEP-S2 --mask 255.255.255.255 --rsource -m udp -j DNAT --to-destination 10.1.1.2:53
-A KUBE-SERVICES -d 172.30.0.1/32 -p tcp -m comment --comment "shop/foo:http cluster IP" -m tcp --dport 80 -j KUBE-SVC-A
-A KUBE-SERVICES -d 172.30.0.2/32 -p udp -m comment --comment "shop/sticky:dns cluster IP" -m udp --dport 53 -j KUBE-SVC-S
-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-SVC-A ! -s 10.1.0.0/16 -d 172.30.0.1/32 -p tcp -m comment --comment "shop/foo:http cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-A -m comment --comment "shop/foo:http -> 10.1.0.1:8080" -m statistic --mode random --probability 0.33333333349 -j KUBE-SEP-A1
-A KUBE-SVC-A -m comment --comment "shop/foo:http -> 10.1.0.2:8080" -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-A2
-A KUBE-SVC-A -m comment --comment "shop/foo:http -> 10.1.0.3:8080" -j KUBE-SEP-A3
-A KUBE-SVC-S -m recent --rcheck --seconds 10800 --reap --name KUBE-SEP-S1 --mask 255.255.255.255 --rsource -j KUBE-SEP-S1
-A KUBE-SVC-S -m recent --rcheck --seconds 10800 --reap --name KUBE-SEP-S2 --mask 255.255.255.255 --rsource -j KUBE-SEP-S2
-A KUBE-SVC-S -j NFLOG --nflog-prefix "kp1:miss" --nflog-group 100
-A KUBE-SVC-S -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-S1
-A KUBE-SVC-S -j KUBE-SEP-S2
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-SERVICES - [0:0]
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A FORWARD -s 10.1.0.0/16 -j ACCEPT
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A KUBE-SERVICES -d 172.30.0.9/32 -p tcp -m comment --comment "shop/empty has no endpoints" -m tcp --dport 80 -j REJECT --reject-with icmp-port-unreachable
COMMIT
`

func mustParse(t testing.TB, text string) *Ruleset {
	t.Helper()
	rs, err := Parse(IPv4, text)
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

func syn(src, dst string) Packet {
	s, d := netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)
	return Packet{Proto: "tcp", Src: s.Addr(), Dst: d.Addr(), SPort: s.Port(), DPort: d.Port(),
		In: "veth0", State: StateNew, TCPFlags: 2}
}

func isNode(a netip.Addr) bool { return a == netip.MustParseAddr("192.168.0.1") || a.IsLoopback() }

// show writes leaves as "probability verdict destination mark [m] chain:index…".
func show(leaves []Leaf) []string {
	var out []string
	for _, l := range leaves {
		s := fmt.Sprintf("%.4f %v %v:%d", l.Probability, l.Verdict, l.Packet.Dst, l.Packet.DPort)
		if l.RejectWith != "" {
			s += " " + l.RejectWith
		}
		if l.Packet.Masqueraded {
			s += " masq"
		}
		out = append(out, s)
	}
	return out
}

func TestWalkKube(t *testing.T) {
	w := NewWalker(mustParse(t, kubeNode))
	dns := syn("10.1.9.9:4000", "172.30.0.2:53")
	dns.Proto, dns.TCPFlags = "udp", 0
	local := syn("192.168.0.1:4000", "172.30.0.1:80")
	local.In = ""
	reply := syn("10.1.0.1:8080", "10.1.9.9:4000")
	reply.State, reply.Reply = StateEstablished|StateDNAT, true
	invalid := syn("8.8.8.8:8080", "10.1.9.9:4000")
	invalid.State = StateInvalid
	third := []string{
		"0.3333 accept 10.1.0.1:8080", "0.3333 accept 10.1.0.2:8080", "0.3333 accept 10.1.0.3:8080"}
	masq := func(s []string) []string {
		out := slices.Clone(s)
		for i := range out {
			out[i] += " masq"
		}
		return out
	}
	hit := func(list string) func(string, *Packet) Tri {
		return func(l string, _ *Packet) Tri { return tri(l == list) }
	}
	hairpin := slices.Clone(third)
	hairpin[1] += " masq"
	for _, tc := range []struct {
		name string
		p    Packet
		at   []Station
		o    Oracles
		want []string
	}{
		{"pod to ClusterIP", syn("10.1.9.9:4000", "172.30.0.1:80"), Received(), Oracles{}, third},
		{"hairpin", syn("10.1.0.2:4000", "172.30.0.1:80"), Received(), Oracles{}, hairpin},
		{"node to ClusterIP", local, Sent(), Oracles{}, masq(third)},
		{"outside to NodePort", syn("8.8.8.8:4000", "192.168.0.1:30080"), Received(), Oracles{}, masq(third)},
		{"outside to a port of the node", syn("8.8.8.8:4000", "192.168.0.1:22"), Received(), Oracles{}, []string{"1.0000 accept 192.168.0.1:22"}},
		{"no endpoints", syn("10.1.9.9:4000", "172.30.0.9:80"), Received(), Oracles{}, []string{"1.0000 reject 172.30.0.9:80 icmp-port-unreachable"}},
		{"not forwarded", syn("8.8.8.8:4000", "10.1.0.1:8080"), Received(), Oracles{}, []string{"1.0000 drop 10.1.0.1:8080"}},
		{"no affinity", dns, Received(), Oracles{}, []string{"0.5000 accept 10.1.1.1:53", "0.5000 accept 10.1.1.2:53"}},
		{"affinity", dns, Received(), Oracles{Recent: hit("KUBE-SEP-S2")}, []string{"1.0000 accept 10.1.1.2:53"}},
		{"reply", reply, Received(), Oracles{}, []string{"1.0000 accept 10.1.9.9:4000"}},
		{"invalid", invalid, Received(), Oracles{}, []string{"1.0000 drop 10.1.9.9:4000"}},
	} {
		tc.o.Local = isNode
		leaves := w.Walk(tc.p, tc.at, tc.o)
		if got := show(leaves); !slices.Equal(got, tc.want) {
			t.Errorf("%s: got %q, want %q", tc.name, got, tc.want)
		}
		sum := 0.0
		for _, l := range leaves {
			sum += l.Probability
		}
		if math.Abs(sum-1) > 1e-9 {
			t.Errorf("%s: probabilities add up to %v", tc.name, sum)
		}
	}
}

func TestWalkSteps(t *testing.T) {
	w := NewWalker(mustParse(t, kubeNode))
	leaves := w.Walk(syn("8.8.8.8:4000", "192.168.0.1:30080"), Received(), Oracles{Local: isNode})
	var got []string
	for _, s := range leaves[1].Steps {
		line := fmt.Sprintf("%s %s:%s:%d %s", s.Hook, s.Table, s.Chain, s.Index, s.Effect)
		if s.MarkAfter != s.MarkBefore {
			line += fmt.Sprintf(" %#x->%#x", s.MarkBefore, s.MarkAfter)
		}
		if s.Probability < 1 {
			line += fmt.Sprintf(" %.2f", s.Probability)
		}
		if s.Effect == EffectDNAT {
			line += " " + s.DstAfter.String()
		}
		if (s.Rule == nil) != (s.Index > len(w.rules.Chain(s.Table, s.Chain).Rules)) {
			t.Errorf("%s: rule %v", line, s.Rule)
		}
		got = append(got, line)
	}
	want := []string{
		"prerouting nat:PREROUTING:1 jump",
		"prerouting nat:KUBE-SERVICES:3 jump",
		"prerouting nat:KUBE-NODEPORTS:1 jump",
		"prerouting nat:KUBE-EXT-A:1 jump",
		"prerouting nat:KUBE-MARK-MASQ:1 match 0x0->0x4000",
		"prerouting nat:KUBE-MARK-MASQ:2 return",
		"prerouting nat:KUBE-EXT-A:2 jump",
		"prerouting nat:KUBE-SVC-A:3 jump 0.50",
		"prerouting nat:KUBE-SEP-A2:2 dnat 10.1.0.2:8080",
		"forward filter:FORWARD:1 jump",
		"forward filter:KUBE-FORWARD:2 accept",
		"postrouting nat:POSTROUTING:1 jump",
		"postrouting nat:KUBE-POSTROUTING:2 match 0x4000->0x0",
		"postrouting nat:KUBE-POSTROUTING:3 masquerade",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestWalkSemantics(t *testing.T) {
	for _, tc := range []struct {
		name, rules string
		want        []string
	}{
		{"goto returns to the caller's caller", "-A FORWARD -j A\n-A FORWARD -j DROP\n-A A -g B\n-A A -j ACCEPT\n-A B -m mark --mark 0x1\n", []string{"1.0000 drop"}},
		{"goto from a built-in chain ends in its policy", "-A FORWARD -g B\n-A FORWARD -j DROP\n-A B -j RETURN\n", []string{"1.0000 accept"}},
		{"return", "-A FORWARD -j A\n-A FORWARD -j DROP\n-A A -p tcp -j RETURN\n-A A -j ACCEPT\n", []string{"1.0000 drop"}},
		{"a circle", "-A FORWARD -j A\n-A A -j B\n-A B -j A\n", []string{"1.0000 lost"}},
		{"a circle of goto", "-A FORWARD -j A\n-A A -g B\n-A B -g A\n", []string{"1.0000 lost"}},
		{"unknown match", "-A FORWARD -m foo --bar 1 -j DROP\n", []string{"1.0000 drop [+foo]", "1.0000 accept [-foo]"}},
		{"unknown match and chance", "-A FORWARD -m foo --bar -m statistic --mode random --probability 0.25 -j DROP\n",
			[]string{"0.2500 drop [+foo]", "0.7500 accept [+foo]", "1.0000 accept [-foo]"}},
		{"unknown match on a log", "-A FORWARD -m limit --limit 5/sec -j LOG\n", []string{"1.0000 accept"}},
		{"unknown target", "-A FORWARD -j FOO --bar 5\n", []string{"1.0000 lost"}},
		{"chance on a log", "-A FORWARD -m statistic --mode random --probability 0.25 -j NFLOG\n", []string{"1.0000 accept"}},
		{"nth", "-A FORWARD -m statistic --mode nth --every 4 --packet 0 -j DROP\n", []string{"0.2500 drop", "0.7500 accept"}},
		{"flags", "-A FORWARD -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j DROP\n", []string{"1.0000 drop"}},
		{"other flags", "-A FORWARD -p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -j DROP\n", []string{"1.0000 accept"}},
		{"ports", "-A FORWARD -p tcp -m multiport --dports 79,81:90 -j DROP\n-A FORWARD -p tcp -m tcp --dport 70:80 -j REJECT\n", []string{"1.0000 reject"}},
		{"interfaces", "-A FORWARD ! -i veth+ -j DROP\n-A FORWARD -i veth+ ! -o eth0 -j REJECT\n", []string{"1.0000 reject"}},
		{"set unknown", "-A FORWARD -m set --match-set S dst,dst -j DROP\n", []string{"1.0000 drop [+set]", "1.0000 accept [-set]"}},
		{"original destination", "-A FORWARD -m conntrack --ctorigdst 10.0.0.2 --ctorigdstport 80 -j DROP\n", []string{"1.0000 drop"}},
		{"mask with holes", "-A FORWARD -d 10.0.0.2/255.0.0.255 -j DROP\n", []string{"1.0000 drop"}},
		{"host name", "-A FORWARD -d example.org -j DROP\n", []string{"1.0000 drop [+destination]", "1.0000 accept [-destination]"}},
		{"too many unknowns", strings.Repeat("-A FORWARD -m foo -j A\n", 200), nil},
		{"chances without end", strings.Repeat("-A FORWARD -m statistic --mode random --probability 0.5 -j A\n", 200), nil},
	} {
		rs := mustParse(t, "*filter\n:FORWARD ACCEPT [0:0]\n:A - [0:0]\n:B - [0:0]\n"+tc.rules+"COMMIT\n")
		leaves := NewWalker(rs).Walk(syn("10.0.0.1:1", "10.0.0.2:80"), Received(), Oracles{})
		if tc.want == nil {
			if len(leaves) == 0 || len(leaves) > maxLeaves+1000 {
				t.Errorf("%s: %d leaves", tc.name, len(leaves))
			}
			continue
		}
		var got []string
		for _, l := range leaves {
			s := fmt.Sprintf("%.4f %v", l.Probability, l.Verdict)
			for _, a := range l.Assumptions {
				s += fmt.Sprintf(" [%s%s]", map[bool]string{true: "+", false: "-"}[a.Held], strings.Join(a.Matches, ","))
			}
			got = append(got, s)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: got %q, want %q", tc.name, got, tc.want)
		}
	}
}

// TestWalkIndex sends random packets through a long chain with and without
// index.
func TestWalkIndex(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var b strings.Builder
	b.WriteString("*filter\n:FORWARD ACCEPT [0:0]\n:A - [0:0]\n")
	for range 400 {
		dst := []string{"", "-d 10.0.0.%d ", "! -d 10.0.0.%d ", "-d 10.0.0.%d/30 "}[rng.IntN(4)]
		if dst != "" {
			dst = fmt.Sprintf(dst, rng.IntN(8))
		}
		port := []string{"", "-p tcp ", "-p tcp --dport %d ", "-p tcp ! --dport %d ", "-p udp --dport %d ", "-p tcp --dport 0:%d "}[rng.IntN(6)]
		if strings.Contains(port, "%") {
			port = fmt.Sprintf(port, rng.IntN(8))
		}
		fmt.Fprintf(&b, "-A FORWARD %s%s-j A\n", dst, port)
	}
	b.WriteString("COMMIT\n")
	w := NewWalker(mustParse(t, b.String()))
	if len(w.index) != 1 {
		t.Fatal("no index")
	}
	plain := &Walker{rules: w.rules}
	for range 300 {
		p := syn("10.9.9.9:1", fmt.Sprintf("10.0.0.%d:%d", rng.IntN(9), rng.IntN(9)))
		if rng.IntN(3) == 0 {
			p.Proto = "udp"
		}
		a, b := w.Walk(p, Received(), Oracles{}), plain.Walk(p, Received(), Oracles{})
		if !reflect.DeepEqual(a, b) {
			t.Fatalf("%+v: index %d steps, without %d", p, len(a[0].Steps), len(b[0].Steps))
		}
	}
}

func BenchmarkNewWalker(b *testing.B) {
	rs := mustParse(b, bigSave(5000, 10))
	b.ReportAllocs()
	for b.Loop() {
		NewWalker(rs)
	}
}

// BenchmarkWalk is one walk of a first packet through 5,000 Services of 10
// endpoints: ten leaves.
func BenchmarkWalk(b *testing.B) {
	w := NewWalker(mustParse(b, bigSave(5000, 10)))
	p := syn("10.250.0.9:4000", "172.30.10.10:80")
	at := Received()
	b.ReportAllocs()
	for b.Loop() {
		if l := w.Walk(p, at, Oracles{}); len(l) != 10 {
			b.Fatal(len(l))
		}
	}
}

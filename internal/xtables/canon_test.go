package xtables

import (
	"net/netip"
	"os"
	"strings"
	"testing"
)

// canonCase is one pair of testdata/canon-*.txt.
type canonCase struct{ table, in, out string }

func canonCases(t *testing.T, f Family) []canonCase {
	t.Helper()
	file := "testdata/canon-v4.txt"
	if f == IPv6 {
		file = "testdata/canon-v6.txt"
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var cases []canonCase
	table := ""
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case strings.HasPrefix(line, "*"):
			table = line[1:]
		case strings.HasPrefix(line, "< "):
			cases = append(cases, canonCase{table: table, in: line[2:]})
		case strings.HasPrefix(line, "> "):
			cases[len(cases)-1].out = line[2:]
		}
	}
	return cases
}

func TestCanonical(t *testing.T) {
	for _, f := range []Family{IPv4, IPv6} {
		for _, c := range canonCases(t, f) {
			in, err := ParseRule(f, c.in)
			if err != nil {
				t.Errorf("%v: %v", f, err)
				continue
			}
			if got := in.String(); got != c.out {
				t.Errorf("%v %s\n got %s\nwant %s", f, c.in, got, c.out)
			}
			out, err := ParseRule(f, c.out)
			if err != nil {
				t.Errorf("%v: %v", f, err)
				continue
			}
			if !in.Equal(out) || !out.Equal(in) {
				t.Errorf("%v %s: not equal to %s", f, c.in, c.out)
			}
			if got := out.String(); got != c.out {
				t.Errorf("%v %s: changes when read back: %s", f, c.out, got)
			}
		}
	}
}

// TestBuild holds the constructors against the text upstream writes.
func TestBuild(t *testing.T) {
	ip := netip.MustParseAddr("10.20.30.41")
	const m = 0x4000
	for _, tc := range []struct {
		rule Rule
		text string
	}{
		{Rule{Dst: Host(ip), Proto: TCP, Matches: []Match{Comment("ns1/svc1:p80 cluster IP"), DPort("tcp", 80)}, Target: "KUBE-SVC-X"},
			`-m comment --comment "ns1/svc1:p80 cluster IP" -m tcp -p tcp -d 10.20.30.41 --dport 80 -j KUBE-SVC-X`},
		{Rule{Dst: Host(ip), Proto: UDP, Matches: []Match{DPort("udp", 53)}, Target: "REJECT"},
			`-m udp -p udp -d 10.20.30.41 --dport 53 -j REJECT`},
		{Rule{Matches: []Match{Not(MarkIs(m, m))}, Target: "RETURN"}, `-m mark ! --mark 0x00004000/0x00004000 -j RETURN`},
		{Rule{Target: "MARK", TargetOpts: SetXmark(m, m)}, `-j MARK --or-mark 0x00004000`},
		{Rule{Target: "MARK", TargetOpts: SetXmark(m, 0)}, `-j MARK --xor-mark 0x00004000`},
		{Rule{Target: "MASQUERADE", TargetOpts: RandomFully()}, `-j MASQUERADE --random-fully`},
		{Rule{Matches: []Match{Comment("a"), RecentCheck("KUBE-SEP-A", 10800)}, Target: "KUBE-SEP-A"},
			`-m comment --comment a -m recent --name KUBE-SEP-A --rcheck --seconds 10800 --reap -j KUBE-SEP-A`},
		{Rule{Matches: []Match{Random(1.0 / 3)}, Target: "KUBE-SEP-A"}, `-m statistic --mode random --probability 0.3333333333 -j KUBE-SEP-A`},
		{Rule{Proto: TCP, Matches: []Match{Comment("ns1/svc1:p80"), RecentSet("KUBE-SEP-A"), L4("tcp")}, Target: "DNAT",
			TargetOpts: DNATTo(netip.MustParseAddrPort("10.0.0.1:80"))},
			`-m comment --comment ns1/svc1:p80 -m recent --name KUBE-SEP-A --set -m tcp -p tcp -j DNAT --to-destination 10.0.0.1:80`},
		{Rule{Family: IPv6, Proto: TCP, Matches: []Match{RecentSet("A"), L4("tcp")}, Target: "DNAT",
			TargetOpts: DNATTo(netip.MustParseAddrPort("[fd00:0::1]:80"))},
			`-m recent --name A --set -m tcp -p tcp -j DNAT --to-destination [fd00::1]:80`},
		{Rule{Matches: []Match{DstType("LOCAL")}, Dst: Addr{Prefix: netip.MustParsePrefix("127.0.0.0/8"), Not: true}, Target: "KUBE-NODEPORTS"},
			`-m addrtype --dst-type LOCAL ! -d 127.0.0.0/8 -j KUBE-NODEPORTS`},
		{Rule{Matches: []Match{SrcType("LOCAL"), CTState("ESTABLISHED,RELATED"), NFAcct("x"), MatchSet("S", "dst,dst")}, Target: "ACCEPT"},
			`-m addrtype --src-type LOCAL -m conntrack --ctstate RELATED,ESTABLISHED -m nfacct --nfacct-name x -m set --match-set S dst,dst -j ACCEPT`},
		{Rule{Proto: TCP, Matches: []Match{TCPFlags("SYN,RST,ACK,FIN", "SYN")}, Target: "NFLOG", TargetOpts: NFLog("kp1:x", 100, 96, 32)},
			`-p tcp --syn -j NFLOG --nflog-prefix kp1:x --nflog-group 100 --nflog-size 96 --nflog-threshold 32`},
	} {
		want, err := ParseRule(tc.rule.Family, tc.text)
		if err != nil {
			t.Fatal(err)
		}
		got := New(tc.rule)
		if got.String() != want.String() || tc.rule.String() != want.String() || !got.Equal(want) || !want.Equal(&tc.rule) {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

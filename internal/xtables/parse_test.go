package xtables

import (
	"errors"
	"strings"
	"testing"
)

func FuzzParse(f *testing.F) {
	f.Add(upstreamRestore, false)
	f.Add("*nat\n:PREROUTING ACCEPT [1:2]\n-I PREROUTING 1 -m foo --bar -5 \"x y\" ! --baz -j QUX --a=b\nCOMMIT\n", true)
	f.Add(kubeNode, false)
	f.Add("*filter\n-A FORWARD -m x -j A\n-A A -m statistic --mode nth --every 2 -j FORWARD\n-A FORWARD -g A\n", false)
	f.Add("*filter\n-A A -s ::1,1::2 -j -x\n-N B\n-E B C\n-D C 1\n[1:2] -A C -c 1 2 --syn -p tcp\n-X\n", true)
	f.Fuzz(func(t *testing.T, text string, six bool) {
		family := IPv4
		if six {
			family = IPv6
		}
		rs, err := Parse(family, text)
		if err != nil {
			var perr *ParseError
			if !errors.As(err, &perr) {
				t.Fatalf("not a ParseError: %v", err)
			}
			return
		}
		once := rs.String()
		again, err := Parse(family, once)
		if err != nil {
			t.Fatalf("own output does not parse: %v\n%s", err, once)
		}
		if twice := again.String(); twice != once {
			t.Fatalf("not stable:\n%s\n--\n%s", once, twice)
		}
		for _, d := range Diff(rs, again, nil) {
			if d.Kind != Same && rs.Chain(d.Table, d.Chain).Policy != "" {
				t.Fatalf("differs from its own copy: %+v", d)
			}
		}
		GuessFamily(text)
		LiveKube(rs)
		leaves := NewWalker(rs).Walk(syn("10.0.0.1:1", "172.30.0.41:80"), Received(), Oracles{})
		if len(leaves) == 0 {
			t.Fatal("a packet vanished")
		}
	})
}

func TestParseErrors(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{"*nat\n-A FOO -d 1.2.3\nCOMMIT\n", `line 2: bad address "1.2.3": "-A FOO -d 1.2.3"`},
		{"-A FOO\n", "line 1: not in a table"},
		{"*nat\n\n-A FOO --dport 80\n", "line 3: unknown option --dport"},
		{"*nat\n-A FOO -m comment --comment \"x\n", "line 2: quote is not closed"},
		{"*nat\n-A FOO -m tcp --tcp-flags SYN\n", "line 2: --tcp-flags: too few arguments"},
		{"*nat\n:FOO\n", "line 2: want :CHAIN POLICY"},
		{"*nat\n[1:x] -A FOO\n", "line 2: bad counters"},
		{"*nat\n-Q FOO\n", `line 2: unknown command "-Q"`},
		{"*nat\n-A FOO -j X -j Y\n", "line 2: two targets"},
		{"*nat\n-A FOO -d fd00::1\n", "is not ipv4"},
		{"*nat\n-A FOO ! -j X\n", "! before -j"},
		{"*nat\n*filter\n", "line 2: new table before COMMIT"},
	} {
		_, err := Parse(IPv4, tc.text)
		var perr *ParseError
		if !errors.As(err, &perr) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%q: got %v, want %q", tc.text, err, tc.want)
		}
	}
}

// upstreamRestore has the commands of a restore text that iptables-save never
// prints.
const upstreamRestore = `# comment
*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-XPGD46QRK7WJZT7O - [0:0]
:KUBE-SEP-OLD - [0:0]
-A KUBE-SERVICES -m comment --comment "ns1/svc1:p80 cluster IP" -m tcp -p tcp -d 172.30.0.41 --dport 80 -j KUBE-SVC-XPGD46QRK7WJZT7O
-A KUBE-SVC-XPGD46QRK7WJZT7O -m comment --comment "x" -m statistic --mode random --probability 0.5000000000 -j KUBE-SEP-NEW
-I KUBE-SERVICES 1 -j RETURN
-N KUBE-SEP-NEW
-A KUBE-SEP-NEW -j DNAT --to-destination 10.0.0.1:80
-A KUBE-SEP-NEW -j ACCEPT
-D KUBE-SEP-NEW -j ACCEPT
-X KUBE-SEP-OLD
-P PREROUTING DROP
COMMIT
*filter
[5:6] -A FORWARD -c 7 8 -j ACCEPT
COMMIT
`

func TestParseCommands(t *testing.T) {
	rs, err := Parse(IPv4, upstreamRestore)
	if err != nil {
		t.Fatal(err)
	}
	want := `*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-XPGD46QRK7WJZT7O - [0:0]
:KUBE-SEP-NEW - [0:0]
:PREROUTING DROP [0:0]
-A KUBE-SERVICES -j RETURN
-A KUBE-SERVICES -d 172.30.0.41/32 -p tcp -m comment --comment "ns1/svc1:p80 cluster IP" -m tcp --dport 80 -j KUBE-SVC-XPGD46QRK7WJZT7O
-A KUBE-SVC-XPGD46QRK7WJZT7O -m comment --comment x -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-NEW
-A KUBE-SEP-NEW -j DNAT --to-destination 10.0.0.1:80
COMMIT
*filter
-A FORWARD -j ACCEPT
COMMIT
`
	if got := rs.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if c := rs.Chain("filter", "FORWARD").Rules[0].Counters; c != (Counters{5, 6}) {
		t.Errorf("counters %v", c)
	}
}

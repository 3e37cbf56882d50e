package xtables

import (
	"fmt"
	"strings"
	"testing"
)

// bigSave is the nat table of a kube-proxy: services of endpoints each, as
// iptables-save prints it.
func bigSave(services, endpoints int) string {
	var decl, rules strings.Builder
	decl.WriteString("*nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n" +
		":KUBE-MARK-MASQ - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-SERVICES - [0:0]\n")
	rules.WriteString(`-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
`)
	for i := range services {
		svc, key := fmt.Sprintf("KUBE-SVC-%016d", i), fmt.Sprintf("ns%d/svc%d:http", i%100, i)
		vip := fmt.Sprintf("172.30.%d.%d", i>>8, i&255)
		fmt.Fprintf(&decl, ":%s - [0:0]\n", svc)
		fmt.Fprintf(&rules, "-A KUBE-SERVICES -d %s/32 -p tcp -m comment --comment \"%s cluster IP\" -m tcp --dport 80 -j %s\n", vip, key, svc)
		fmt.Fprintf(&rules, "-A %s ! -s 10.0.0.0/8 -d %s/32 -p tcp -m comment --comment \"%s cluster IP\" -m tcp --dport 80 -j KUBE-MARK-MASQ\n", svc, vip, key)
		for e := range endpoints {
			sep, ip := fmt.Sprintf("KUBE-SEP-%011d%05d", i, e), fmt.Sprintf("10.%d.%d.%d", i>>8, i&255, e+1)
			fmt.Fprintf(&decl, ":%s - [0:0]\n", sep)
			pick := ""
			if left := endpoints - e; left > 1 {
				pick = "-m statistic --mode random --probability " + probabilityText(fmt.Sprint(1/float64(left))) + " "
			}
			fmt.Fprintf(&rules, "-A %s -m comment --comment \"%s -> %s:8080\" %s-j %s\n", svc, key, ip, pick, sep)
			fmt.Fprintf(&rules, "-A %s -s %s/32 -m comment --comment \"%s\" -j KUBE-MARK-MASQ\n", sep, ip, key)
			fmt.Fprintf(&rules, "-A %s -p tcp -m comment --comment \"%s\" -m tcp -j DNAT --to-destination %s:8080\n", sep, key, ip)
		}
	}
	rules.WriteString("-A KUBE-SERVICES -m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n")
	return decl.String() + rules.String()
}

// The benchmarks below are for 5,000 Services of 10 endpoints: 160,008 rules.

func BenchmarkParse(b *testing.B) {
	text := bigSave(5000, 10)
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Parse(IPv4, text); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPrint(b *testing.B) {
	rs, err := Parse(IPv4, bigSave(5000, 10))
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		_ = rs.String()
	}
}

func BenchmarkDiff(b *testing.B) {
	have, err1 := Parse(IPv4, bigSave(5000, 10))
	want, err2 := Parse(IPv4, bigSave(4999, 10))
	if err1 != nil || err2 != nil {
		b.Fatal(err1, err2)
	}
	b.ReportAllocs()
	for b.Loop() {
		if d := Diff(have, want, func(string, string) bool { return true }); len(d) < 50000 {
			b.Fatal(len(d))
		}
	}
}

func TestBigSave(t *testing.T) {
	text := bigSave(50, 3)
	rs, err := Parse(IPv4, text)
	if err != nil {
		t.Fatal(err)
	}
	if rs.String() != text[:strings.Index(text, "-A")]+sortedByChain(text) {
		t.Error("does not print what it read")
	}
}

// sortedByChain puts the rules of a text into the order of its chains.
func sortedByChain(text string) string {
	byChain := map[string]*strings.Builder{}
	var order []string
	for line := range strings.Lines(text) {
		if name, ok := strings.CutPrefix(line, ":"); ok {
			name, _, _ = strings.Cut(name, " ")
			order, byChain[name] = append(order, name), &strings.Builder{}
		} else if rule, ok := strings.CutPrefix(line, "-A "); ok {
			name, _, _ := strings.Cut(rule, " ")
			byChain[name].WriteString(line)
		}
	}
	var b strings.Builder
	for _, name := range order {
		b.WriteString(byChain[name].String())
	}
	return b.String() + "COMMIT\n"
}

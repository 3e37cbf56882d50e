package xtables

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// cut returns the lines that are left of a text.
func cut(text string, in func(string) bool) []string {
	p := newSieve(in)
	for _, read := range []func([]byte){p.learn, p.keep} {
		w := &lineWriter{line: read}
		for text := text; text != ""; { // in writes that end anywhere
			n := min(7, len(text))
			_, _ = w.Write([]byte(text[:n]))
			text = text[n:]
		}
		p.decide()
	}
	return slices.Collect(strings.Lines(p.text.String()))
}

// TestPart divides the rules of 40 Services, whose own chains say nothing of whose
// they are, as those of large clusters do not.
func TestPart(t *testing.T) {
	const services, parts = 40, 3
	var chains, rules strings.Builder
	for i := range services {
		fmt.Fprintf(&chains, ":KUBE-SVC-%02d - [0:0]\n:KUBE-SEP-%02d - [0:0]\n:KUBE-EXT-%02d - [0:0]\n", i, i, i)
		fmt.Fprintf(&rules, "-A KUBE-SERVICES -d 10.0.0.%d/32 -p tcp -m comment --comment \"ns/s%02d:http cluster IP\" -m tcp --dport 80 -j KUBE-SVC-%02d\n", i, i, i)
		fmt.Fprintf(&rules, "-A KUBE-NODEPORTS -p tcp -m comment --comment \"ns/s%02d:http\" -m tcp --dport %d -j KUBE-EXT-%02d\n", i, 30000+i, i)
		fmt.Fprintf(&rules, "-A KUBE-EXT-%02d -j KUBE-SVC-%02d\n-A KUBE-SVC-%02d -j KUBE-SEP-%02d\n", i, i, i, i)
		fmt.Fprintf(&rules, "-A KUBE-SEP-%02d -p tcp -m tcp -j DNAT --to-destination 10.1.0.%d:80\n", i, i)
		fmt.Fprintf(&rules, "-A KUBE-EXTERNAL-SERVICES -m comment --comment \"ns/s%02d:http has no endpoints\" -j REJECT\n", i)
	}
	const nobodys = `*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-SVC-UNUSED - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m comment --comment "other/program" -j DNAT --to-destination 10.2.0.1
-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SVC-UNUSED -j RETURN
COMMIT
`
	text := strings.Replace(nobodys, "-A PREROUTING", chains.String()+rules.String()+"-A PREROUTING", 1)
	times := map[string]int{}
	for part := range parts {
		lines := cut(text, func(name string) bool {
			var n int
			if _, err := fmt.Sscanf(name, "ns/s%d:http", &n); err != nil {
				t.Errorf("asked about %q", name)
			}
			return n%parts == part
		})
		rs, err := Parse(IPv4, strings.Join(lines, ""))
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range rs.Table("nat").Chains {
			for _, r := range c.Rules {
				if strings.HasPrefix(r.Target, "KUBE-") && rs.Chain("nat", r.Target) == nil {
					t.Errorf("part %d: %s leads to %s, which is not there", part, c.Name, r.Target)
				}
			}
		}
		for _, l := range lines {
			times[l]++
		}
	}
	for l := range strings.Lines(text) {
		want := 1
		if strings.Contains(nobodys, l) {
			want = parts
		}
		if times[l] != want {
			t.Errorf("in %d parts, want %d: %s", times[l], want, l)
		}
	}
}

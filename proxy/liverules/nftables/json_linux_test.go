package nftables

import (
	"slices"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
)

// byHand has what kube-proxy does not write, as others do.
const byHand = `table inet filter {
	set blocked {
		type ipv4_addr
		flags interval
		elements = { 10.1.0.0/16, 10.2.0.1-10.2.0.9 }
	}
	set seen {
		type ipv4_addr
		flags timeout
		timeout 1d30m
	}
	map to {
		type inet_service : ipv4_addr
		elements = { 80 : 10.0.0.1, 443 : 10.0.0.2 }
	}
	chain forward {
		type filter hook forward priority filter - 5; policy drop;
		ct state established,related accept
		ct state invalid counter packets 0 bytes 0 drop
		iifname "eth*" oifname != "veth1" ip saddr @blocked drop
		ip saddr { 10.3.0.1, 10.3.0.8-10.3.0.12 } tcp dport { 22, 80-90 } log prefix "no: " group 3 drop
		ip daddr & 0.0.0.255 == 0.0.0.1 limit rate 10/second burst 5 packets accept
		tcp flags syn limit rate over 400/minute drop
		udp dport 53 notrack
		meta mark & 0x000000ff == 0x00000010 return
		ct direction original ct mark set meta mark
		fib daddr type local jump other comment "to the node"
		ip protocol icmp reject with icmp host-prohibited
		tcp dport 25 reject with tcp reset
	}
	chain other {
		meta l4proto . th dport vmap { tcp . 1 : drop, udp . 2-5 : jump last }
	}
	chain last {
		counter packets 0 bytes 0
	}
}
table ip nat {
	chain pre {
		type nat hook prerouting priority dstnat; policy accept;
		tcp dport 8080 dnat to 10.0.0.1:80
		tcp dport 8081 redirect to :81
		dnat to tcp dport map @to
	}
	map to {
		type inet_service : ipv4_addr
	}
	chain post {
		type nat hook postrouting priority srcnat; policy accept;
		oifname "eth0" masquerade fully-random
		snat to 192.0.2.1
	}
}
`

// TestFromJSON lets nft print one ruleset in both ways: turned into text, JSON is
// what nft prints as text, word for word, and where this is known to be more, no
// less.
func TestFromJSON(t *testing.T) {
	for name, rules := range map[string]string{"upstream": upstream(t), "by hand": byHand} {
		t.Run(name, func(t *testing.T) {
			asText, asJSON := printed(t, rules)
			got, err := FromJSON([]byte(asJSON))
			if err != nil {
				t.Fatal(err)
			}
			a, b := plain(got), plain(asText)
			for i := range max(len(a), len(b)) {
				if i >= len(a) || i >= len(b) || a[i] != b[i] {
					t.Fatalf("line %d\n%s\nas text\n%s", i, at(a, i), at(b, i))
				}
			}
			if len(a) < 30 {
				t.Fatalf("%d lines are compared", len(a))
			}
		})
	}
}

// TestParseJSON: a Program from JSON knows what one from text knows.
func TestParseJSON(t *testing.T) {
	asText, asJSON := printed(t, upstream(t))
	a, err := Parse(Config{}, asText)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Parse(Config{}, asJSON)
	if err != nil {
		t.Fatal(err)
	}
	if len(a.Services()) != len(b.Services()) || len(b.Services()) != 145 || len(b.Unknown()) > 0 {
		t.Fatalf("%d Services from text, %d from JSON, not understood: %v", len(a.Services()), len(b.Services()), b.Unknown())
	}
	for i, s := range a.Services() {
		x, y := *s, *b.Services()[i]
		for j := range x.Fronts {
			f, g := x.Fronts[j], y.Fronts[j]
			if f.Verdict != g.Verdict || f.Addr != g.Addr || f.Chain != g.Chain || f.Port != g.Port || len(f.Choices) != len(g.Choices) || f.Missing != g.Missing {
				t.Errorf("%s: %+v from text, %+v from JSON", x.Name, f, g)
			}
		}
	}
}

// TestFromJSONUnknown: what is not known does not vanish.
func TestFromJSONUnknown(t *testing.T) {
	t.Parallel()
	got, err := FromJSON([]byte(`{"nftables":[{"table":{"family":"ip","name":"t"}},
		{"chain":{"family":"ip","table":"t","name":"c"}},
		{"rule":{"family":"ip","table":"t","chain":"c","expr":[{"tproxy":{"port":1}},{"accept":null}]}}]}`))
	if err != nil || !strings.Contains(got, `json:tproxy "{\"port\":1}" accept`) {
		t.Errorf("%v, %s", err, got)
	}
	for _, bad := range []string{`{`, `{}`, `{"nftables":[]} x`, `[]`,
		`{"nftables":[{"rule":{"family":"ip","table":"t","chain":"c","expr":[]}}]}`} {
		if _, err := FromJSON([]byte(bad)); err == nil {
			t.Errorf("%s is no error", bad)
		}
	}
}

func FuzzFromJSON(f *testing.F) {
	f.Add([]byte(`{"nftables":[{"table":{"family":"ip","name":"kube-proxy"}},{"chain":{"family":"ip","table":"kube-proxy","name":"c","type":"nat","hook":"output","prio":-100,"policy":"accept"}},
		{"rule":{"family":"ip","table":"kube-proxy","chain":"c","expr":[{"match":{"op":"==","left":{"payload":{"protocol":"ip","field":"daddr"}},"right":{"set":["10.0.0.1",{"range":[1,2]}]}}},{"dnat":{"addr":"10.0.0.1","port":80}}]}}]}`))
	f.Fuzz(func(_ *testing.T, b []byte) {
		if text, err := FromJSON(b); err == nil {
			_, _ = Parse(Config{}, text)
		}
	})
}

// printed lets the kernel have rules, and nft print them.
func printed(t *testing.T, rules string) (text, json string) {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	nft := func(stdin string, args ...string) string {
		t.Helper()
		res, err := exec.Run(t.Context(), exec.Spec{Path: "nft", Args: args, Stdin: strings.NewReader(stdin), Netns: ns.Fd()})
		if err != nil {
			t.Fatal(err)
		}
		return string(res.Stdout)
	}
	for _, part := range parts(rules) {
		nft(part, "-f", "-")
	}
	return nft("", "list", "ruleset"), nft("", "-j", "list", "ruleset")
}

// parts divides a listing, for a transaction of an ordinary user is small: first all
// chains, sets and maps, empty, in their order, then what is in them.
func parts(rules string) []string {
	var empty, body strings.Builder
	var out []string
	table := ""
	for l := range strings.Lines(rules) {
		depth := len(l) - len(strings.TrimLeft(l, "\t"))
		bare := strings.TrimSpace(l)
		if depth == 0 && bare != "" && bare != "}" {
			table = l
		}
		// What declares, and what is in it.
		declares := depth == 0 || depth == 1 && !strings.HasPrefix(bare, "comment ") || strings.HasPrefix(bare, "type ") || strings.HasPrefix(bare, "typeof ") || strings.HasPrefix(bare, "flags ") ||
			strings.HasPrefix(bare, "timeout ")
		if declares {
			empty.WriteString(l)
		}
		body.WriteString(l)
		if depth == 1 && bare == "}" && body.Len() > 8<<10 {
			out = append(out, body.String()+"}\n")
			body.Reset()
			body.WriteString(table)
		}
	}
	return append([]string{empty.String()}, append(out, body.String())...)
}

// plain are the lines of a listing in one form: sets before chains and maps by
// their names, without comments of tables and chains, which JSON does not have, and
// elements on one line.
func plain(text string) []string {
	p := parser{words: words(text)}
	var out []string
	family, depth, kind := "", 0, ""
	var line []string
	for p.at < len(p.words) {
		w := p.next()
		switch {
		case w == "{" && depth < 2:
			depth++
			if depth == 1 {
				family = strings.Join(line, " ")
			} else {
				kind = family + " " + strings.Join(line, " ")
			}
			line = nil
		case w == "{":
			l, err := p.list()
			if err != nil {
				return nil
			}
			line = append(line, l)
		case w == "}":
			depth--
			fallthrough
		case w == "\n":
			if len(line) > 0 && depth > 0 && !(line[0] == "comment" && (kind == "" || strings.Contains(kind, " chain "))) {
				out = append(out, kind+": "+strings.Join(line, " "))
			}
			line = nil
			if depth < 2 {
				kind = ""
			}
		default:
			line = append(line, strings.Trim(w, `"`))
		}
	}
	// nft 1.0.6 has "dynamic" in text only, and "timeout" where it likes.
	out = slices.DeleteFunc(out, func(l string) bool { return strings.Contains(l, ": flags") && strings.HasSuffix(l, "timeout") })
	for i, l := range out {
		for _, short := range []struct{ long, short string }{
			{"priority dstnat - 10", "priority -110"}, {"priority dstnat", "priority -100"}, {"priority srcnat", "priority 100"},
			{"priority filter - 5", "priority -5"}, {"priority filter", "priority 0"},
		} {
			if strings.Contains(l, short.long) {
				l = strings.Replace(l, short.long, short.short, 1)
				break
			}
		}
		out[i] = l
	}
	slices.SortStableFunc(out, func(a, b string) int { // lines of one chain or set stay in order
		x, _, _ := strings.Cut(a, ": ")
		y, _, _ := strings.Cut(b, ": ")
		return strings.Compare(x, y)
	})
	return out
}

func at(lines []string, i int) string {
	if i >= len(lines) {
		return "(nothing)"
	}
	return lines[i]
}

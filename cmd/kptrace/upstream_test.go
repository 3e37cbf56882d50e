package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/exporters/text"
)

// TestUpstreamFixtures explains and checks what iptables-save printed on nodes of
// an upstream kube-proxy 1.36, with a Service for everything that shapes rules
// (test/e2e, TestExplainUpstream, writes these files). It runs on any OS.
func TestUpstreamFixtures(t *testing.T) {
	for file, want := range map[string]struct {
		services int
		lines    []string
		packet   string
		says     []string
	}{
		"upstream-nft-ipv4.rules": {73, []string{"shop/affinity-short:dns", "10.244.2.10:8053", "dropped: no local endpoints", "only from 203.0.113.0/24"},
			"tcp:203.0.113.9:40000-198.18.0.10:80", []string{"service   shop/ranges:http by LoadBalancer", "its source is allowed to use the load balancer", "masqueraded (external)"}},
		"upstream-legacy-ipv6.rules": {72, []string{"[fd00:244:0:2::a]:8080", "rejected: no endpoints"},
			"tcp:[2001:db8::9]:40000-[fd00:18::10]:80", []string{"outside the source ranges"}},
		"upstream-nftables.rules": {145, []string{"shop/affinity-short:dns", "10.244.2.10:8053", "dropped: no local endpoints", "only from 198.51.100.128/25, 203.0.113.0/24", "[fd00:244:0:2::a]:8080"},
			"tcp:203.0.113.9:40000-198.18.0.10:80", []string{"service   shop/ranges:http by LoadBalancer", "see whether the source ranges of shop/ranges:http let it in", "masqueraded (external)"}},
	} {
		t.Run(file, func(t *testing.T) {
			dump, err := os.ReadFile("testdata/upstream/" + file)
			if err != nil {
				t.Fatal(err)
			}
			kptrace := func(want int, args ...string) string {
				t.Helper()
				var out, talk bytes.Buffer
				if code := run(args, bytes.NewReader(dump), &out, &talk); code != want || talk.Len() > 0 {
					t.Fatalf("%v: exit %d, want %d: %s", args, code, want, &talk)
				}
				return out.String()
			}
			table := kptrace(0, "explain", "--rules", "-")
			for _, w := range want.lines {
				if !strings.Contains(table, w) {
					t.Errorf("%q is not in the table", w)
				}
			}
			var doc text.RulesJSON
			if err := json.Unmarshal([]byte(kptrace(0, "explain", "--rules", "-", "-o", "json")), &doc); err != nil {
				t.Fatal(err)
			}
			if len(doc.Services) != want.services {
				t.Errorf("%d Services, want %d", len(doc.Services), want.services)
			}
			for _, s := range doc.Services {
				for _, a := range s.Addresses {
					sum := 0.0
					for _, e := range a.Endpoints {
						sum += e.Probability
					}
					if a.Verdict == "forward" && (sum < 0.99999 || sum > 1.00001) {
						t.Errorf("odds of %s/%s at %s:%d add up to %v", s.Namespace, s.Name, a.IP, a.Port, sum)
					}
				}
			}
			if out := kptrace(0, "check", "--rules", "-"); out != "" {
				t.Errorf("a healthy node: %s", out)
			}
			out := kptrace(0, "explain", "--rules", "-", "--packet", want.packet, "--node-ip", "192.0.2.1,fd00:1::1")
			for _, w := range want.says {
				if !strings.Contains(out, w) {
					t.Errorf("%q is not in %s", w, out)
				}
			}
		})
	}
}

package path

import (
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/trace"
)

// listed is of kube-proxy's own tables, as nft -a -t prints them.
const listed = `table ip kube-proxy { # handle 1
	map service-ips { # handle 5
		type ipv4_addr . inet_proto . inet_service : verdict
	}

	chain nat-prerouting { # handle 20
		type nat hook prerouting priority dstnat; policy accept;
		jump services # handle 40
	}

	chain services { # handle 21
		ip daddr . meta l4proto . th dport vmap @service-ips # handle 41
	}

	chain service-JGENSEBX-shop/foo/tcp/http { # handle 22
		numgen random mod 2 vmap { 0 : goto endpoint-ODHJZG6P-shop/foo/tcp/http__10.1.0.2/8080, 1 : goto endpoint-ODHJZG6Q-shop/foo/tcp/http__10.1.0.3/8080 } # handle 42
	}

	chain endpoint-ODHJZG6P-shop/foo/tcp/http__10.1.0.2/8080 { # handle 23
		ip saddr 10.1.0.2 meta mark set meta mark | 0x00004000 # handle 43
		meta l4proto tcp dnat to 10.1.0.2:8080 # handle 44
	}
}
`

// TestNative joins what was met in tables that iptables does not show.
func TestNative(t *testing.T) {
	w := newWorld(t)
	w.gen.Hooks = map[ChainKey]string{{nfnl.FamilyIPv4, "kube-proxy", "nat-prerouting"}: "prerouting"}
	w.gen.native(listed)
	w.gen.Unlisted = "table inet x could not be listed: no nft"
	pre, post := header("10.9.0.2:40000", "10.96.0.10:80", 64, syn, 1000, 0), header("10.9.0.2:40000", "10.1.0.2:8080", 63, syn, 1000, 0)
	w.nft(1, "raw", "KPTRACE-PATH", "-j TRACE", 0, pre, 2, 0)
	const service, endpoint = "service-JGENSEBX-shop/foo/tcp/http", "endpoint-ODHJZG6P-shop/foo/tcp/http__10.1.0.2/8080"
	for i, r := range []struct {
		chain, verdict, target string
		handle                 uint64
	}{
		{"nat-prerouting", "jump", "services", 40},
		{"services", "goto", service, 41},
		{service, "goto", endpoint, 42},
		{endpoint, "accept", "", 44},
		{endpoint, "continue", "", 99}, // not listed
	} {
		h := trace.RuleHit{
			Source: trace.NFTrace, Time: w.now - int64(time.Second), Family: nfnl.FamilyIPv4, Table: "kube-proxy", Chain: r.chain, TraceID: 1,
			Kind: trace.HopRule, Handle: r.handle, Verdict: r.verdict, Target: r.target, HasMark: true,
		}
		if i == 0 {
			h.Packet, h.HasPacket, h.InDev = *pre, true, 2
		}
		if r.handle == 99 {
			w.gen.From = w.now // read after it was met
		}
		w.j.Hit(&h, w.now)
	}
	w.nft(1, "filter", "FORWARD", "policy", 0, post, 2, 3)
	got := w.after(4 * time.Second)
	if len(got) != 1 {
		t.Fatalf("%d paths", len(got))
	}
	want := []string{
		"prerouting nat-prerouting 1 jump services: see whether it is for a Service| jump services",
		"prerouting services 1 goto " + service + ": cluster IP of shop/foo:http| ip daddr . meta l4proto . th dport vmap @service-ips",
		"prerouting " + service + " 1 goto " + endpoint + ": pick 1 of 2, p = 0.500: foo-5c 10.1.0.2:8080| numgen random mod 2 vmap",
		"prerouting " + endpoint + " 2 dnat: DNAT to foo-5c 10.1.0.2:8080{dst 10.1.0.2:8080}| meta l4proto tcp dnat to 10.1.0.2:8080",
		"prerouting " + endpoint + " 0 continue: rule 99: table inet x could not be listed: no nft| ",
	}
	for i, s := range want {
		h := got[0].Path.Hops[i]
		said := h.Hook + " " + h.Chain + " " + string(rune('0'+h.Rule)) + " " + strings.TrimSpace(h.Verdict+" "+h.Target) + ": " + h.Purpose
		for _, c := range h.Changes {
			said += "{" + c.Field + " " + c.After + "}"
		}
		if said += "| " + h.Text; !strings.HasPrefix(said, s) {
			t.Errorf("hop %d\n%s, want\n%s", i, said, s)
		}
	}
}

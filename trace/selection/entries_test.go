package selection

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy/proxytest"
	"github.com/kptrace/kptrace/trace"
)

func list(entries []Entry) string {
	var s []string
	for _, e := range entries {
		s = append(s, e.Proto.String()+" "+e.Addr.String())
	}
	slices.Sort(s)
	return strings.Join(s, ", ")
}

func TestOf(t *testing.T) {
	snap := proxytest.Services(`
		shop/web:http  tcp 10.96.0.10:80 nodeport=30080 external=198.51.100.5 lb=198.51.100.7 a:8080 b:8080
		shop/dns:dns   udp 10.96.0.13:53 a:5353
		other/api      tcp 10.96.0.14:80 a:8080
	`)
	local := []netip.Addr{proxytest.NodeAddr, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("fe80::1"), netip.MustParseAddr("fd00::1")}
	resource := func(s string) trace.Filter {
		sel, err := trace.ParseResource(s, "shop")
		if err != nil {
			t.Fatal(err)
		}
		return trace.Filter{Resources: []trace.Selector{sel}}
	}
	all := "tcp 10.96.0.10:80, tcp 10.96.0.14:80, tcp 127.0.0.1:30080, tcp 192.0.2.1:30080, tcp 198.51.100.5:80, tcp 198.51.100.7:80, udp 10.96.0.13:53"
	for name, c := range map[string]struct {
		filter   trace.Filter
		to, from string
	}{
		"a service":            {resource("svc/web"), "tcp 10.96.0.10:80, tcp 127.0.0.1:30080, tcp 192.0.2.1:30080, tcp 198.51.100.5:80, tcp 198.51.100.7:80", "tcp 10.244.1.2:8080, tcp 10.244.1.3:8080"},
		"another":              {resource("svc/dns"), "udp 10.96.0.13:53", "udp 10.244.1.2:5353"},
		"none such":            {resource("svc/nothing"), "", ""},
		"a namespace":          {trace.Filter{Namespace: "other"}, "tcp 10.96.0.14:80", "tcp 10.244.1.2:8080"},
		"all":                  {trace.Filter{}, all, "tcp 10.244.1.2:8080, tcp 10.244.1.3:8080, udp 10.244.1.2:5353"},
		"a pod, by any way":    {resource("pod/web-1"), all, "tcp 10.244.1.2:8080, tcp 10.244.1.3:8080, udp 10.244.1.2:5353"},
		"a port of the filter": {trace.Filter{Namespace: "shop", Ports: []trace.Port{{Number: 30080}}}, "tcp 127.0.0.1:30080, tcp 192.0.2.1:30080", "tcp 10.244.1.2:8080, tcp 10.244.1.3:8080"},
	} {
		w := Of(snap, &c.filter, local)
		if list(w.To) != c.to || list(w.From) != c.from {
			t.Errorf("%s:\nto   %s\nwant %s\nfrom %s\nwant %s", name, list(w.To), c.to, list(w.From), c.from)
		}
	}
}

func TestMerge(t *testing.T) {
	e := func(s string) Entry { return Entry{netip.MustParseAddrPort(s), conntrack.TCP} }
	a := Want{To: []Entry{e("10.0.0.2:1"), e("10.0.0.1:1")}, Packets: 1}
	b := Want{To: []Entry{e("10.0.0.1:1"), e("10.0.0.3:1")}, From: []Entry{e("10.1.0.1:2")}, Packets: 5}
	m := a.Merge(b)
	if list(m.To) != "tcp 10.0.0.1:1, tcp 10.0.0.2:1, tcp 10.0.0.3:1" || list(m.From) != "tcp 10.1.0.1:2" || m.Packets != 5 {
		t.Errorf("merged %+v", m)
	}
	if m := b.Merge(Want{Packets: trace.AllPackets}); m.Packets != trace.AllPackets {
		t.Errorf("all packets and some are %d", m.Packets)
	}
}

// TestRules wants every TRACE behind a limit and every jump behind a set, so that
// nothing is traced once the sets are empty.
func TestRules(t *testing.T) {
	for _, packets := range []int{1, 2, 32, trace.AllPackets} {
		body, jumps := rules("4", packets, 1000, 10000)
		for _, r := range body {
			if !strings.HasSuffix(r, "-j TRACE") || !strings.Contains(r, "-m limit --limit 1000/sec") {
				t.Errorf("%d packets: %q", packets, r)
			}
		}
		for _, r := range jumps {
			if !strings.Contains(r, "--match-set kptrace-") || !strings.HasSuffix(r, "-j KPTRACE-PATH") {
				t.Errorf("%d packets: %q", packets, r)
			}
		}
		if len(body) == 0 || len(jumps) < 2 {
			t.Errorf("%d packets: %v %v", packets, body, jumps)
		}
	}
}

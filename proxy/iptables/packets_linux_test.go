package iptables

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// TestPackets sends a real packet for every row of the table.
func TestPackets(t *testing.T) {
	for i := range 4 {
		flavour, six, cases := []string{"nft", "legacy"}[i&1], i&2 != 0, proxytest.Cases()
		name := flavour
		if six {
			name, cases = flavour+" ipv6", proxytest.Cases6()
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorldOf(t, six)
			for _, c := range cases {
				t.Run(c.Name, func(t *testing.T) {
					cfg := configFor(c.Setup)
					cfg.Flavour, cfg.Tools.Netns = flavour, w.node.Fd()
					b := New(cfg)
					p := b.Render(c.Setup.Snapshot, c.Setup.Overlay)
					if _, err := b.Apply(t.Context(), p); err != nil {
						t.Fatal(err)
					}
					for _, row := range c.Rows {
						t.Run(row.Name(), func(t *testing.T) { w.check(t, row) })
					}
				})
			}
		})
	}
}

// check sends a row's packets until every endpoint has answered.
func (w *world) check(t *testing.T, row proxytest.Row) {
	timeout := 2 * time.Second
	want := map[proxy.Verdict]string{proxy.Forward: "answered", proxy.Reject: "refused", proxy.Drop: "timeout"}[row.Want.Verdict]
	if row.Want.Verdict == proxy.Drop {
		timeout = 100 * time.Millisecond
	}
	if row.Want.Verdict == proxy.Pass {
		switch {
		case row.To.Addr() == w.addr(proxytest.NodeAddr), row.To.Addr().IsLoopback():
			want = "refused" // by the node itself
		case slices.Contains([]netip.Addr{w.addr(proxytest.FromA.Addr()), w.addr(proxytest.FromB.Addr()), w.addr(proxytest.FromC.Addr())}, row.To.Addr()):
			want = "answered" // by the pod itself
		case row.Proto == conntrack.UDP: // whose sockets do not hear of unreachable hosts
			want, timeout = "timeout", 100*time.Millisecond
		default:
			want = "unreachable"
		}
	}
	seen := map[netip.AddrPort]bool{}
	for range 100 {
		r := w.from(row.From, row.Proto, row.To, timeout)
		if r.outcome() != want {
			t.Fatalf("%s (%v), want %s", r.outcome(), r.err, want)
		}
		if row.Want.Verdict != proxy.Forward {
			return
		}
		client := row.Client()
		if row.MasqueradeOf(r.endpoint) != "" {
			client = w.addr(proxytest.NodeAddr)
		}
		if r.seen != client {
			t.Fatalf("%s saw the client as %s, want %s", r.endpoint, r.seen, client)
		}
		seen[r.endpoint] = true
		if len(seen) == len(row.Want.Endpoints) || row.Want.Affinity > 0 {
			break
		}
	}
	found := 0
	for _, ep := range row.Want.Endpoints {
		if seen[ep] {
			found++
		}
	}
	if found != len(seen) || found < len(row.Want.Endpoints) && row.Want.Affinity == 0 {
		t.Errorf("endpoints that answered: %v, want %v", seen, row.Want.Endpoints)
	}
}

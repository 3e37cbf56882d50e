package node

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
	"github.com/kptrace/kptrace/trace"
)

// TestPathsThroughABridge has the node's pods on a bridge, and real packets between
// them and beyond go as predicted, in both flavours, whether the node's rules see
// what crosses the bridge or not. The bridge's own rules, of ebtables and of a table
// of nftables, are met where the kernel runs them, and the ports are told.
func TestPathsThroughABridge(t *testing.T) {
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		for _, call := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s,call=%t", fl, call), func(t *testing.T) {
				w := proxytest.NewBridgedWorld(t, call)
				setup := proxytest.Setup{Snapshot: proxytest.Services(`
					shop/web:p tcp 10.96.3.10:80 b:8080
					shop/far:p tcp 10.96.3.11:80 c:8080
				`), ClusterCIDR: proxytest.ClusterCIDR}
				bridgeRules(t, w)
				rig := newPathRig(t, w.Node, fl, false)
				rig.watchWire()
				b := backendFor(setup, w.Node, fl, false)
				prog := b.Render(setup.Snapshot, proxy.Overlay{})
				if _, err := b.Apply(t.Context(), prog); err != nil {
					t.Fatal(err)
				}
				rig.follow(t.Context(), setup.Snapshot, 1)
				port := uint16(20000)
				way := func(from proxytest.Source, to string) *trace.Path {
					t.Helper()
					port++
					dst := netip.MustParseAddrPort(to)
					w.Must(w.NS[from].Do(func() error { proxytest.Send(conntrack.TCP, port, dst, 300*time.Millisecond); return nil }))
					seen, ok := rig.find(port, "SYN")
					if !ok {
						t.Fatalf("the SYN of %s to %s was not seen", from, to)
					}
					pkt := proxy.Packet{Proto: conntrack.TCP, Src: netip.AddrPortFrom(from.Addr(), port), Dst: dst}
					out := prog.Walk(pkt)
					if why := verdictOn(&out, pkt, &seen.Path); why != "" {
						t.Errorf("%s to %s: %s", from, to, why)
					}
					return &seen.Path
				}
				near, far, back := way(proxytest.FromPod, "10.96.3.10:80"), way(proxytest.FromPod, "10.96.3.11:80"), way(proxytest.FromOutside, "10.96.3.10:80")

				in, bridge := "to-pod", "cni0"
				if !call {
					in = "to-pod cni0"
				}
				wantWire(t, "to a pod on the bridge", near, in, "cni0 to-b") // it asks who that is
				wantWire(t, "to a pod elsewhere", far, "to-pod cni0", "to-c")
				wantWire(t, "from outside", back, "to-outside", "cni0 to-b")
				for _, p := range []*trace.Path{near, far} {
					if h := hopAt(p, "prerouting", "nat", "PREROUTING"); h == nil || h.In != bridge {
						t.Errorf("in the rules of prerouting it came in by %+v, want %s", h, bridge)
					} else if fl == xtables.Legacy && call && h.PhysIn != "to-pod" {
						t.Errorf("its port is %q", h.PhysIn)
					}
				}
				if h := hopAt(near, "forward", "filter", "FORWARD"); fl == xtables.Legacy && call && (h == nil || h.PhysIn != "to-pod" || h.PhysOut != "to-b") {
					t.Errorf("ports at forward: %+v", h)
				}
				if fl == xtables.Legacy {
					return // traces of bridges come by nf_tables only
				}
				var met []string
				for i := range near.Hops {
					if h := &near.Hops[i]; h.Bridge() && h.Kind == trace.HopRule {
						met = append(met, strings.TrimSpace(fmt.Sprintf("%s/%s/%s %s %s %s", h.Hook, h.Table, h.Chain, h.In, h.Out, h.Verdict)))
					}
				}
				want := []string{"bridge forward/filter/FORWARD to-pod to-b accept", "bridge postrouting/guard/post  to-b match"}
				if !call {
					want = []string{"bridge output/guard/outp  to-b match", "bridge postrouting/guard/post  to-b match"}
				}
				if !slices.Equal(met, want) {
					t.Errorf("rules of the bridge:\n%s\nwant\n%s", strings.Join(met, "\n"), strings.Join(want, "\n"))
				}
			})
		}
	}
}

// bridgeRules has an ebtables rule and a table of nftables see what crosses.
func bridgeRules(t *testing.T, w *proxytest.World) {
	t.Helper()
	for _, c := range []struct{ path, arg, in string }{
		{"ebtables-nft-restore", "", "*filter\n:INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT\n-A FORWARD -p IPv4 -j ACCEPT\n"},
		{"nft", "-f -", `table bridge guard {
			chain pre { type filter hook prerouting priority -300; ip protocol tcp counter; }
			chain outp { type filter hook output priority 0; ip protocol tcp counter; }
			chain post { type filter hook postrouting priority 0; ip protocol tcp counter; }
		}`},
	} {
		_, err := exec.Run(t.Context(), exec.Spec{Path: c.path, Args: strings.Fields(c.arg), Stdin: strings.NewReader(c.in), Netns: w.Node.Fd()})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// hopAt is the first hop of a hook, table and chain.
func hopAt(p *trace.Path, hook, table, chain string) *trace.Hop {
	for i := range p.Hops {
		if h := &p.Hops[i]; h.Hook == hook && h.Table == table && h.Chain == chain {
			return h
		}
	}
	return nil
}

func wantWire(t *testing.T, what string, p *trace.Path, in, out string) {
	t.Helper()
	got := map[string][]string{}
	for i := range p.Hops {
		if h := &p.Hops[i]; h.Kind == trace.HopWire {
			got[h.Hook] = append(got[h.Hook], h.In+h.Out)
		}
	}
	if i, o := strings.Join(got["in"], " "), strings.Join(got["out"], " "); i != in || o != out {
		t.Errorf("%s: in by %q, out by %q; want %q and %q", what, i, o, in, out)
	}
}

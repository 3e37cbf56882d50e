package node

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/explain"
	"github.com/kptrace/kptrace/trace/explain/explaintest"
)

// verdictOn holds an observed path against a prediction; "" is agreement.
func verdictOn(out *proxy.Outcome, pkt proxy.Packet, seen *trace.Path) string {
	a := explain.Outcome(out, proxy.IPTables, pkt)
	return explaintest.Differs(&a, seen, false)
}

// TestPredictedIsObserved generates Services, endpoints, policies and clients,
// asks what would become of each client's first packet, sends it, and wants the
// kernel to have done that, rule by rule, given the endpoint that was picked.
func TestPredictedIsObserved(t *testing.T) {
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		t.Run(fl.String(), func(t *testing.T) {
			r := rand.New(rand.NewPCG(proxytest.Seed(t), uint64(fl)))
			w := proxytest.NewWorld(t, false)
			rig := newPathRig(t, w.Node, fl, false)
			port, n := uint16(20000), 0
			for round := range 8 {
				text := proxytest.RandomServices(r, 2+r.IntN(4), fmt.Sprintf("r%d", round))
				setup := proxytest.Setup{Snapshot: proxytest.Services(text), MasqueradeAll: r.IntN(4) == 0}
				if r.IntN(4) > 0 {
					setup.ClusterCIDR = proxytest.ClusterCIDR
				}
				b := backendFor(setup, w.Node, fl, false)
				prog := b.Render(setup.Snapshot, proxy.Overlay{})
				if _, err := b.Apply(t.Context(), prog); err != nil {
					t.Fatal(err)
				}
				rig.follow(t.Context(), setup.Snapshot, 1)
				sent := proxytest.Trials(r, setup.Snapshot, &port)
				for i := range sent {
					w.Must(w.NS[sent[i].From].Do(func() error {
						proxytest.Send(sent[i].Packet.Proto, sent[i].Packet.Src.Port(), sent[i].Packet.Dst, 50*time.Millisecond)
						return nil
					}))
				}
				for i := range sent {
					pkt := sent[i].Packet
					out := prog.Walk(pkt)
					if out.Verdict == proxy.Pass {
						continue
					}
					name := "SYN"
					if pkt.Proto != conntrack.TCP {
						name = pkt.Proto.String()
					}
					seen, ok := rig.find(pkt.Src.Port(), name)
					if !ok {
						t.Fatalf("round %d: no path of %s to %s was seen; Services:\n%s", round, sent[i].From, pkt.Dst, text)
					}
					n++
					if why := verdictOn(&out, pkt, &seen.Path); why != "" {
						t.Errorf("round %d: %s to %s: %s\nServices:\n%s", round, sent[i].From, pkt.Dst, why, text)
					}
				}
			}
			t.Logf("%d packets went as predicted", n)
			if n < 80 {
				t.Errorf("only %d packets", n)
			}
		})
	}
}

// TestPicksFollowOdds wants the endpoints that are picked to have the shares
// predicted.
func TestPicksFollowOdds(t *testing.T) {
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		t.Run(fl.String(), func(t *testing.T) {
			w := proxytest.NewWorld(t, false)
			rig := newPathRig(t, w.Node, fl, false)
			setup := proxytest.Setup{Snapshot: proxytest.Services("shop/web:p tcp 10.96.3.10:80 a:8080 b:8080 c:8080"), ClusterCIDR: proxytest.ClusterCIDR}
			b := backendFor(setup, w.Node, fl, false)
			prog := b.Render(setup.Snapshot, proxy.Overlay{})
			if _, err := b.Apply(t.Context(), prog); err != nil {
				t.Fatal(err)
			}
			rig.follow(t.Context(), setup.Snapshot, 1)
			const sent, first = 300, 30000
			to := netip.MustParseAddrPort("10.96.3.10:80")
			w.Must(w.NS[proxytest.FromPod].Do(func() error {
				for i := range sent {
					proxytest.Send(conntrack.TCP, uint16(first+i), to, time.Second)
				}
				return nil
			}))
			got := map[netip.AddrPort]float64{}
			for i := range sent {
				j, ok := rig.find(uint16(first+i), "SYN")
				if !ok {
					t.Fatalf("connection %d was not seen", i)
				}
				got[j.Path.Endpoint()]++
			}
			out := prog.Walk(proxy.Packet{Proto: conntrack.TCP, Src: netip.AddrPortFrom(proxytest.FromPod.Addr(), first), Dst: to})
			odds := map[netip.AddrPort]float64{}
			for _, c := range out.Choices {
				odds[c.Endpoint] = c.Probability
			}
			chi := proxytest.ChiSquared(got, odds)
			t.Logf("picks %v, chi-squared %.2f", got, chi)
			if len(out.Choices) != 3 || chi > 23 {
				t.Errorf("picks %v do not follow the odds: chi-squared %.2f", got, chi)
			}
		})
	}
}

// TestWrongRulesAreCaught changes one rule at a time behind the proxy's back, and
// wants a packet whose path is not the predicted one.
func TestWrongRulesAreCaught(t *testing.T) {
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		t.Run(fl.String(), func(t *testing.T) {
			w := proxytest.NewWorld(t, false)
			rig := newPathRig(t, w.Node, fl, false)
			setup := proxytest.Setup{
				Snapshot:    proxytest.Services("shop/web:p tcp 10.96.3.10:80 a:8080 b:8080 c:8080"),
				ClusterCIDR: proxytest.ClusterCIDR,
			}
			b := backendFor(setup, w.Node, fl, false)
			prog := b.Render(setup.Snapshot, proxy.Overlay{})
			apply := func() {
				t.Helper()
				b.Forget()
				if _, err := b.Apply(t.Context(), prog); err != nil {
					t.Fatal(err)
				}
			}
			apply()
			rig.follow(t.Context(), setup.Snapshot, 1)
			port := uint16(20000)
			to := netip.MustParseAddrPort("10.96.3.10:80")
			// caught sends packets of a pod and from outside, and wants each to go
			// as predicted, and all together where the odds say.
			caught := func() string {
				const most = 30
				picks := map[netip.AddrPort]float64{}
				for _, from := range []proxytest.Source{proxytest.FromOutside, proxytest.FromPod} {
					first := port + 1
					port += most
					w.Must(w.NS[from].Do(func() error {
						for p := first; p <= port; p++ {
							proxytest.Send(conntrack.TCP, p, to, 20*time.Millisecond)
						}
						return nil
					}))
					for p := first; p <= port; p++ {
						pkt := proxy.Packet{Proto: conntrack.TCP, Src: netip.AddrPortFrom(from.Addr(), p), Dst: to}
						out := prog.Walk(pkt)
						seen, ok := rig.find(p, "SYN")
						if !ok {
							t.Fatalf("packet from port %d was not seen", p)
						}
						if why := verdictOn(&out, pkt, &seen.Path); why != "" {
							return why
						}
						picks[seen.Path.Endpoint()]++
					}
				}
				odds := map[netip.AddrPort]float64{}
				for _, ep := range setup.Snapshot.Services[0].Endpoints {
					odds[ep.Addr] = 1. / 3
				}
				if proxytest.ChiSquared(picks, odds) > 23 {
					return fmt.Sprintf("the picks %v do not follow the odds", picks)
				}
				return ""
			}
			if why := caught(); why != "" {
				t.Fatalf("right rules: %s", why)
			}
			n := 0
			for _, m := range proxytest.WrongRules() {
				undo := w.Mutate(t, fl, m)
				rig.reload(t.Context())
				if why := caught(); why == "" {
					t.Errorf("%s: not caught", m.Name)
				} else {
					n++
				}
				undo()
				apply()
				rig.reload(t.Context())
			}
			if why := caught(); why != "" {
				t.Errorf("after the repair: %s", why)
			}
			t.Logf("%d of %d wrong rules caught", n, len(proxytest.WrongRules()))
		})
	}
}

// TestTableIsObserved sends the first packet of every row of the conformance
// table, of both families, and wants the path that the row's Program predicts.
func TestTableIsObserved(t *testing.T) {
	for i := range 4 {
		fl, six, cases := xtables.Flavour(i&1), i&2 != 0, proxytest.Cases()
		name := fl.String()
		if six {
			name, cases = name+" ipv6", proxytest.Cases6()
		}
		t.Run(name, func(t *testing.T) {
			w := proxytest.NewWorld(t, six)
			rig := newPathRig(t, w.Node, fl, six)
			port := uint16(20000)
			for _, c := range cases {
				b := backendFor(c.Setup, w.Node, fl, six)
				prog := b.Render(c.Setup.Snapshot, c.Setup.Overlay)
				if _, err := b.Apply(t.Context(), prog); err != nil {
					t.Fatal(err)
				}
				rig.follow(t.Context(), c.Setup.Snapshot, 1)
				for _, row := range c.Rows {
					pkt := row.Packet()
					out := prog.Walk(pkt)
					if out.Verdict == proxy.Pass {
						continue
					}
					port++
					w.Must(w.NS[row.From].Do(func() error {
						proxytest.Send(row.Proto, port, row.To, 50*time.Millisecond)
						return nil
					}))
					packet := "SYN"
					if row.Proto != conntrack.TCP {
						packet = row.Proto.String()
					}
					seen, ok := rig.find(port, packet)
					if !ok {
						t.Errorf("%s: %s: not seen", c.Name, row.Name())
					} else if why := verdictOn(&out, pkt, &seen.Path); why != "" {
						t.Errorf("%s: %s: %s", c.Name, row.Name(), why)
					}
				}
			}
		})
	}
}

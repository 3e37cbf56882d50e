package iptables

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

func TestConformance(t *testing.T) {
	for i := range 4 {
		trace, cases := i&1 != 0, proxytest.Cases()
		if i&2 != 0 {
			cases = proxytest.Cases6()
		}
		t.Run(fmt.Sprintf("trace=%t,ipv6=%t", trace, i&2 != 0), func(t *testing.T) {
			proxytest.Run(t, cases, func(t *testing.T, s proxytest.Setup) func(proxy.Packet) proxy.Outcome {
				cfg := configFor(s)
				cfg.Trace = trace
				p := New(cfg).Render(s.Snapshot, s.Overlay)
				if len(p.Problems()) > 0 {
					t.Errorf("problems: %v", p.Problems())
				}
				return p.Walk
			})
		})
	}
}

// configFor is the Config of a Setup of the table.
func configFor(s proxytest.Setup) Config {
	cfg := Config{MasqueradeAll: s.MasqueradeAll, LocalhostNodePorts: true, Trace: true}
	if s.Snapshot != nil && s.Snapshot.Services[0].Is6() {
		cfg.Family = xtables.IPv6
	}
	if s.ClusterCIDR.IsValid() {
		cfg.ClusterCIDRs = []netip.Prefix{s.ClusterCIDR}
	}
	return cfg
}

// TestWalkLocalnet walks packets that come from outside to 127.0.0.1. Those to a
// Service with endpoints are translated, and so pass the rule against it; others are
// dropped there before the Service's own rules see them.
func TestWalkLocalnet(t *testing.T) {
	s := proxytest.Setup{Snapshot: proxytest.Services(`
		shop/web:http  tcp 10.96.0.10:80 nodeport=30080 a:8080
		shop/none:http tcp 10.96.0.12:80 nodeport=30081
		shop/there     tcp 10.96.2.11:80 policy=external nodeport=30071 c:8080
	`), ClusterCIDR: proxytest.ClusterCIDR}
	p := New(configFor(s)).Render(s.Snapshot, s.Overlay)
	for port, want := range map[uint16]proxy.Outcome{
		30080: {Verdict: proxy.Forward, Service: proxy.PortName{Namespace: "shop", Name: "web", Port: "http", Proto: conntrack.TCP}},
		30081: {Verdict: proxy.Drop, Reason: "localnet"},
		30071: {Verdict: proxy.Drop, Service: proxy.PortName{Namespace: "shop", Name: "there", Proto: conntrack.TCP}, Reason: "localnet"},
		9:     {Verdict: proxy.Drop, Reason: "localnet"},
	} {
		pkt := proxy.Packet{Proto: conntrack.TCP, Src: netip.AddrPortFrom(proxytest.FromOutside.Addr(), 40000),
			Dst: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), In: "eth0"}
		if got := p.Walk(pkt); got.Verdict != want.Verdict || got.Service != want.Service || got.Reason != want.Reason {
			t.Errorf("to port %d: %v %v %q, want %v %v %q", port, got.Verdict, got.Service, got.Reason, want.Verdict, want.Service, want.Reason)
		}
	}
}

// TestWalkPurposes wants a sentence for every rule on every way.
func TestWalkPurposes(t *testing.T) {
	for _, c := range proxytest.Cases() {
		p := New(configFor(c.Setup)).Render(c.Setup.Snapshot, c.Setup.Overlay)
		for _, row := range c.Rows {
			out := p.Walk(row.Packet())
			ways := [][]proxy.Step{out.Steps}
			for _, ch := range out.Choices {
				ways = append(ways, ch.Steps)
			}
			for _, way := range ways {
				for _, s := range way {
					if s.Text != "" && s.Purpose == "" {
						t.Errorf("%s: no purpose for %s %s %q", row.Name(), s.Table, s.Chain, s.Text)
					}
				}
			}
		}
	}
}

// TestWalkCache asks in two orders and from many sources: what is shared must
// be the same as what is not.
func TestWalkCache(t *testing.T) {
	for _, c := range proxytest.Cases() {
		shared := New(configFor(c.Setup)).Render(c.Setup.Snapshot, c.Setup.Overlay)
		for _, row := range c.Rows {
			for _, src := range proxytest.Sources() {
				pkt := row.Packet()
				pkt.Src, pkt.FromNode = netip.AddrPortFrom(src.Addr(), 1234), src == proxytest.FromNode
				alone := New(configFor(c.Setup)).Render(c.Setup.Snapshot, c.Setup.Overlay).Walk(pkt)
				if a, b := fmt.Sprint(alone), fmt.Sprint(shared.Walk(pkt)); a != b {
					t.Errorf("%s from %s:\nalone  %s\nshared %s", row.Name(), src, a, b)
				}
			}
		}
	}
}

// large is a cluster of n Services with e endpoints each.
func large(n, e int) *proxy.Snapshot {
	s := &proxy.Snapshot{Node: proxytest.Node()}
	for i := range n {
		svc := proxy.Service{Name: proxy.PortName{Namespace: "load", Name: fmt.Sprintf("svc-%05d", i), Port: "http", Proto: conntrack.TCP},
			ClusterIP: netip.AddrFrom4([4]byte{10, 97, byte(i >> 8), byte(i)}), Port: 80}
		for j := range e {
			k := i*e + j
			svc.Endpoints = append(svc.Endpoints, proxy.Endpoint{Ready: true, Serving: true,
				Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 128 + byte(k>>16), byte(k >> 8), byte(k)}), 8080)})
		}
		s.Services = append(s.Services, svc)
	}
	return s
}

func BenchmarkRender(b *testing.B) {
	for _, n := range []int{1000, 5000} {
		s := large(n, 10)
		b.Run(fmt.Sprintf("services=%d/cold", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				New(configFor(proxytest.Setup{ClusterCIDR: proxytest.ClusterCIDR})).Render(s, proxy.Overlay{})
			}
		})
		b.Run(fmt.Sprintf("services=%d/again", n), func(b *testing.B) {
			b.ReportAllocs()
			be := New(configFor(proxytest.Setup{ClusterCIDR: proxytest.ClusterCIDR}))
			be.Render(s, proxy.Overlay{})
			for b.Loop() {
				be.Render(s, proxy.Overlay{})
			}
		})
	}
}

func BenchmarkWalk(b *testing.B) {
	s := large(5000, 10)
	p := New(configFor(proxytest.Setup{ClusterCIDR: proxytest.ClusterCIDR})).Render(s, proxy.Overlay{}).(*program)
	pkt := proxy.Packet{Proto: conntrack.TCP, Src: netip.MustParseAddrPort("10.244.1.10:4000")}
	b.Run("hot", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			pkt.Dst = netip.AddrPortFrom(s.Services[i%200].ClusterIP, 80)
			p.Walk(pkt)
		}
	})
	b.Run("cold", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			pkt.Dst = netip.AddrPortFrom(s.Services[i%5000].ClusterIP, 80)
			p.walk(pkt, []proxy.Owner{p.claims[proxy.Claim{IP: pkt.Dst.Addr(), Port: 80, Proto: conntrack.TCP}]})
		}
	})
}

package ipvs

import (
	"context"
	"fmt"
	"net/netip"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/proxy"
)

// large is a state of 1,000 Services of 10 endpoints, the one in the middle with
// one endpoint moved.
func large(moved int) *proxy.Snapshot {
	s := &proxy.Snapshot{Node: proxy.Node{Name: "node1", Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}}
	for i := range 1000 {
		svc := proxy.Service{
			Name: proxy.PortName{Namespace: "ns", Name: fmt.Sprintf("svc%04d", i), Proto: conntrack.TCP},
			Type: "ClusterIP", ClusterIP: netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}), Port: 80,
		}
		for e := range 10 {
			if i == 500 && e == 3 {
				e = 20 + moved%200
			}
			addr := netip.AddrFrom4([4]byte{10, byte(128 + i>>8), byte(i), byte(e + 1)})
			svc.Endpoints = append(svc.Endpoints, proxy.Endpoint{Addr: netip.AddrPortFrom(addr, 8080), Ready: true, Serving: true})
		}
		s.Services = append(s.Services, svc)
	}
	return s
}

// BenchmarkSync programs 1,000 Services of 10 endpoints: all of them into an empty
// namespace, and one endpoint that moved.
func BenchmarkSync(b *testing.B) {
	apply := func(b *testing.B, back *Backend, s *proxy.Snapshot) {
		b.Helper()
		if _, err := back.Apply(context.Background(), back.Render(s, proxy.Overlay{})); err != nil {
			b.Fatal(err)
		}
	}
	fresh := func(b *testing.B) (*Backend, func()) {
		b.Helper()
		ns, err := netns.New()
		if err != nil {
			b.Fatal(err)
		}
		cfg := Config{Flavour: "legacy"}
		cfg.Tools.Netns = ns.Fd()
		back := mustNew(b, cfg)
		if _, _, err := back.Preflight(context.Background()); err != nil {
			b.Fatal(err)
		}
		return back, func() { ns.Close() }
	}
	state := large(0)
	b.Run("full", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			back, done := fresh(b)
			b.StartTimer()
			apply(b, back, state)
			b.StopTimer()
			done()
			b.StartTimer()
		}
	})
	b.Run("endpoint", func(b *testing.B) {
		back, done := fresh(b)
		defer done()
		apply(b, back, state)
		n := 0
		for b.Loop() {
			b.StopTimer()
			n++
			next := large(n)
			b.StartTimer()
			apply(b, back, next)
		}
	})
}

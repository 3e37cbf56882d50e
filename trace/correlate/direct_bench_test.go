package correlate

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// endpointWorld is a generation of Services with ten endpoints each.
func endpointWorld(services int) *proxy.View {
	s := &proxy.Snapshot{Services: make([]proxy.Service, services)}
	for i := range s.Services {
		p := &s.Services[i]
		p.Name = proxy.PortName{Namespace: "shop", Name: fmt.Sprintf("svc-%05d", i), Port: "http", Proto: conntrack.TCP}
		for j := range 10 {
			n := i*10 + j
			p.Endpoints = append(p.Endpoints, proxy.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), 8080)})
		}
	}
	return &proxy.View{Mode: proxy.IPTables, Snapshot: s}
}

// BenchmarkEndpointGeneration is the first connection past a Service after one
// endpoint of 50,000 moved: the generation's two Views, before and after its sync.
func BenchmarkEndpointGeneration(b *testing.B) {
	v := endpointWorld(5000)
	views := []*proxy.View{v}
	c := New(Config{Views: func() []*proxy.View { return views }})
	to := trace.Target{Proto: conntrack.TCP, Addr: netip.MustParseAddrPort("10.0.0.8:8080")}
	if _, ok := c.endpoint(to); !ok {
		b.Fatal("the endpoint is not known")
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		s := *views[0].Snapshot
		s.Services = append([]proxy.Service(nil), s.Services...)
		p := &s.Services[i%len(s.Services)]
		p.Endpoints = append([]proxy.Endpoint(nil), p.Endpoints...)
		p.Endpoints[9].Addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 200, byte(i >> 8), byte(i)}), 8080)
		for range 2 {
			views = []*proxy.View{{Mode: proxy.IPTables, Snapshot: &s}}
			if _, ok := c.endpoint(to); !ok {
				b.Fatal("the endpoint is not known")
			}
		}
	}
}

package ipvs

import (
	"net/netip"
	"reflect"
	"testing"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

func configFor(s proxytest.Setup) Config {
	cfg := Config{MasqueradeAll: s.MasqueradeAll, Trace: true}
	if s.ClusterCIDR.IsValid() {
		cfg.Detect.ClusterCIDRs = []netip.Prefix{s.ClusterCIDR}
	}
	return cfg
}

func mustNew(t testing.TB, cfg Config) *Backend {
	t.Helper()
	b, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestWalk holds the prediction against the table.
func TestWalk(t *testing.T) {
	for name, cases := range map[string][]proxytest.Case{"ipv4": proxytest.Cases(), "ipv6": proxytest.Cases6()} {
		t.Run(name, func(t *testing.T) {
			proxytest.Run(t, proxytest.Balanced(cases), func(t *testing.T, s proxytest.Setup) func(proxy.Packet) proxy.Outcome {
				p := mustNew(t, configFor(s)).Render(s.Snapshot, s.Overlay)
				for _, problem := range p.Problems() {
					t.Error(problem)
				}
				return p.Walk
			})
		})
	}
}

// The cache gives what a walk gives, for every source of the table.
func TestWalkCache(t *testing.T) {
	for _, c := range proxytest.Cases() {
		p := mustNew(t, configFor(c.Setup)).Render(c.Setup.Snapshot, c.Setup.Overlay).(*program)
		for range 2 {
			for _, row := range c.Rows {
				for _, from := range proxytest.Sources() {
					row.From = from
					pkt := row.Packet()
					got, f := p.Walk(pkt), p.families[0]
					u, via := f.owner(&pkt)
					if want := f.walkOnce(pkt, u, via); !reflect.DeepEqual(got, want) {
						t.Errorf("%s: %s: got %+v, want %+v", c.Name, row.Name(), got, want)
					}
				}
			}
		}
	}
}

func BenchmarkWalk(b *testing.B) {
	c := proxytest.Cases()[0]
	p := mustNew(b, configFor(c.Setup)).Render(c.Setup.Snapshot, c.Setup.Overlay)
	pkt := c.Rows[0].Packet()
	b.ReportAllocs()
	for b.Loop() {
		if o := p.Walk(pkt); o.Verdict != proxy.Forward {
			b.Fatal(o)
		}
	}
}

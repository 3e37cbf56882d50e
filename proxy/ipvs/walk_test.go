package ipvs

import (
	"net/netip"
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

package userspace

import (
	"net/netip"
	"testing"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

func TestWalk(t *testing.T) {
	for _, cases := range [][]proxytest.Case{proxytest.Cases(), proxytest.Cases6()} {
		proxytest.Run(t, proxytest.Relayed(cases, Masquerade), func(_ *testing.T, s proxytest.Setup) func(proxy.Packet) proxy.Outcome {
			return New(configFor(s)).Render(s.Snapshot, s.Overlay).Walk
		})
	}
}

// configFor is the Config that a Setup asks for.
func configFor(s proxytest.Setup) Config {
	cfg := Config{LocalhostNodePorts: true, Trace: true}
	if s.ClusterCIDR.IsValid() {
		cfg.Detect.ClusterCIDRs = []netip.Prefix{s.ClusterCIDR}
	}
	return cfg
}

// TestWalkPurposes wants a sentence for every step on every way.
func TestWalkPurposes(t *testing.T) {
	for _, c := range proxytest.Cases() {
		p := New(configFor(c.Setup)).Render(c.Setup.Snapshot, c.Setup.Overlay)
		for _, row := range c.Rows {
			out := p.Walk(row.Packet())
			ways := [][]proxy.Step{out.Steps}
			for _, x := range out.Choices {
				ways = append(ways, x.Steps)
			}
			for _, way := range ways {
				for _, s := range way {
					if s.Purpose == "" || s.Chain == "" || s.Text == "" {
						t.Errorf("%s: %s: step %+v says too little", c.Name, row.Name(), s)
					}
				}
			}
			if out.Verdict != proxy.Pass && len(out.Steps)+len(out.Choices) == 0 {
				t.Errorf("%s: %s: no way", c.Name, row.Name())
			}
		}
	}
}

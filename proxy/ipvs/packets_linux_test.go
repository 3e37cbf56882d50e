package ipvs

import (
	"testing"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// newWorld is proxytest's world with a node that IPVS works on.
func newWorld(t *testing.T, six bool) *proxytest.World {
	t.Helper()
	w := proxytest.NewWorld(t, six)
	for _, s := range Sysctls(false, "") {
		w.Must(w.Node.SetSysctl(s.Name, s.Value))
	}
	return w
}

// inWorld is a Backend for the world's node.
func inWorld(t *testing.T, w *proxytest.World, cfg Config) *Backend {
	t.Helper()
	cfg.Flavour, cfg.Tools.Netns = "legacy", w.Node.Fd() // the guest has no nf_tables
	return mustNew(t, cfg)
}

func mustApply(t *testing.T, b *Backend, s *proxy.Snapshot, o proxy.Overlay) proxy.Report {
	t.Helper()
	rep, err := b.Apply(t.Context(), b.Render(s, o))
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

// TestPackets sends a real packet for every row of the table.
func TestPackets(t *testing.T) {
	for name, cases := range map[string][]proxytest.Case{"ipv4": proxytest.Cases(), "ipv6": proxytest.Cases6()} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, name == "ipv6")
			for _, c := range proxytest.Balanced(cases) {
				t.Run(c.Name, func(t *testing.T) {
					b := inWorld(t, w, configFor(c.Setup))
					mustApply(t, b, c.Setup.Snapshot, c.Setup.Overlay)
					for _, row := range c.Rows {
						t.Run(row.Name(), func(t *testing.T) { w.Check(t, row) })
					}
				})
			}
		})
	}
}

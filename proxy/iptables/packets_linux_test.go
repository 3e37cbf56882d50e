package iptables

import (
	"testing"

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
			w := proxytest.NewWorld(t, six)
			for _, c := range cases {
				t.Run(c.Name, func(t *testing.T) {
					cfg := configFor(c.Setup)
					cfg.Flavour, cfg.Tools.Netns = flavour, w.Node.Fd()
					b := New(cfg)
					p := b.Render(c.Setup.Snapshot, c.Setup.Overlay)
					if _, err := b.Apply(t.Context(), p); err != nil {
						t.Fatal(err)
					}
					for _, row := range c.Rows {
						t.Run(row.Name(), func(t *testing.T) { w.Check(t, row) })
					}
				})
			}
		})
	}
}

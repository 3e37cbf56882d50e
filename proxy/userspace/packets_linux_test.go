package userspace

import (
	"context"
	"net/netip"
	"testing"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// start makes a Backend for a test, which ends with it.
func start(t *testing.T, cfg Config) *Backend {
	t.Helper()
	b := New(cfg)
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := b.Run(ctx); err != nil {
			t.Error(err)
		}
		if n := b.inUse.Load(); n != 0 {
			t.Errorf("%d descriptors of the budget were not given back", n)
		}
	})
	return b
}

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
			for j, c := range proxytest.Relayed(cases, Masquerade) {
				t.Run(c.Name, func(t *testing.T) {
					cfg := configFor(c.Setup)
					cfg.Flavour, cfg.Tools.Netns, cfg.Drain = flavour, w.Node.Fd(), -1
					if j%2 == 1 { // DNAT to the node's address, else REDIRECT
						cfg.NodePorts.LocalAddrs = func() []netip.Addr { return []netip.Addr{w.Addr(proxytest.NodeAddr)} }
					}
					b := start(t, cfg)
					p := b.Render(c.Setup.Snapshot, c.Setup.Overlay)
					if _, err := b.Apply(t.Context(), p); err != nil {
						t.Fatal(err)
					}
					for _, row := range c.Rows {
						t.Run(row.Name(), func(t *testing.T) { w.Check(t, row) })
					}
					b.Forget()
					if rep, err := b.Apply(t.Context(), p); err != nil || rep.Commits != 0 || !rep.Full {
						t.Errorf("the same again: %+v, %v; want nothing written", rep, err)
					}
				})
			}
			leavesNothing(t, w, flavour)
		})
	}
}

// leavesNothing cleans up and looks for what is left.
func leavesNothing(t *testing.T, w *proxytest.World, flavour string) {
	t.Helper()
	tools := xtables.Tools{Netns: w.Node.Fd()}
	b := New(Config{Tools: tools, Flavour: flavour})
	for range 2 {
		if err := b.Cleanup(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	fl, err := xtables.ParseFlavour(flavour)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		rs, err := tools.Save(t.Context(), fl, f, "", false)
		if err != nil {
			t.Fatal(err)
		}
		if n := rs.Rules(); n != 0 {
			text, _ := tools.SaveText(t.Context(), fl, f, "", false)
			t.Errorf("%d rules are left:\n%s", n, text)
		}
	}
}

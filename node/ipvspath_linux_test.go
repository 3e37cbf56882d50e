package node

import (
	"net/netip"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/umlguest/guesttest"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/ipvs"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// balancedFor is the IPVS mode of a Setup in a world.
func balancedFor(t *testing.T, w *proxytest.World, s proxytest.Setup) *ipvs.Backend {
	t.Helper()
	for _, c := range ipvs.Sysctls(false, "") {
		w.Must(w.Node.SetSysctl(c.Name, c.Value))
	}
	cfg := ipvs.Config{Flavour: "legacy", Trace: true, MasqueradeAll: s.MasqueradeAll}
	cfg.Tools.Netns = w.Node.Fd()
	if s.ClusterCIDR.IsValid() {
		cfg.Detect.ClusterCIDRs = []netip.Prefix{s.ClusterCIDR}
	}
	b, err := ipvs.New(cfg)
	w.Must(err)
	return b
}

// TestIPVSTableIsObserved is TestTableIsObserved in the IPVS mode: real packets
// through a real IPVS, each rule before and behind it as predicted, and IPVS
// itself as one hop that names the endpoint.
func TestIPVSTableIsObserved(t *testing.T) {
	guesttest.Group(t, func(t *testing.T) {
		for name, cases := range map[string][]proxytest.Case{"ipv4": proxytest.Cases(), "ipv6": proxytest.Cases6()} {
			t.Run(name, func(t *testing.T) {
				w := proxytest.NewWorld(t, name == "ipv6")
				rig := newPathRig(t, w.Node, xtables.Legacy, name == "ipv6")
				port, balanced := uint16(20000), 0
				for _, c := range proxytest.Balanced(cases) {
					b := balancedFor(t, w, c.Setup)
					prog := b.Render(c.Setup.Snapshot, c.Setup.Overlay)
					if _, err := b.Apply(t.Context(), prog); err != nil {
						t.Fatal(err)
					}
					rig.follow(t.Context(), c.Setup.Snapshot, 1)
					for _, row := range c.Rows {
						pkt := row.Packet()
						out := prog.Walk(pkt)
						if out.Service == (proxy.PortName{}) {
							continue // nobody follows it
						}
						port++
						w.Must(w.NS[row.From].Do(func() error {
							proxytest.Send(row.Proto, port, row.To, 200*time.Millisecond)
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
						} else if seen.Path.Endpoint().IsValid() {
							balanced++
						}
					}
				}
				if balanced < 30 {
					t.Errorf("only %d packets went through IPVS", balanced)
				}
			})
		}
	})
}

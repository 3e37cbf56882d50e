package iptables

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// reports counts, by kind, the packets that met a tagged rule.
func reports(t *testing.T, cfg Config) map[string]uint64 {
	t.Helper()
	fl, err := xtables.ParseFlavour(cfg.Flavour)
	if err != nil {
		t.Fatal(err)
	}
	rs, err := cfg.Tools.Save(t.Context(), fl, cfg.Family, "", true)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]uint64{}
	for _, table := range rs.Tables {
		for _, c := range table.Chains {
			for _, r := range c.Rules {
				prefix, _ := r.TargetOpt("nflog-prefix")
				if tag, ok := proxy.ParseTag(prefix); ok && r.Counters.Packets > 0 {
					out[tag.Kind.String()] += r.Counters.Packets
				}
			}
		}
	}
	return out
}

// TestReports counts what the tagged rules say about one connection of each
// kind: everything once, and nothing about connections that are no Service's.
func TestReports(t *testing.T) {
	services := proxytest.Services(`
		t/web    tcp 10.96.9.1:80 nodeport=30200 a:8080
		t/sticky tcp 10.96.9.2:80 affinity=3h a:8080 b:8080
		t/none   tcp 10.96.9.3:80 nodeport=30201
		t/shut   tcp 10.96.9.4:80 a:9999
		t/dns    udp 10.96.9.5:53 a:5353
		t/deaf   udp 10.96.9.6:53 a:9999
		t/host   tcp 10.96.9.7:80 node:8080`)
	tests := []struct {
		name string
		from proxytest.Source
		kind conntrack.Proto
		to   string
		want map[string]uint64
	}{
		// The server closes first, the client with a reset.
		{"connection", proxytest.FromPod, conntrack.TCP, "10.96.9.1:80", map[string]uint64{"pick": 1, "synack": 1, "fin": 1, "rst": 1}},
		{"from the node", proxytest.FromNode, conntrack.TCP, "10.96.9.1:80", map[string]uint64{"pick": 1, "synack": 1, "fin": 1, "rst": 1}},
		{"node port from the node", proxytest.FromNode, conntrack.TCP, "192.0.2.1:30200", map[string]uint64{"pick": 1, "synack": 1, "fin": 1, "rst": 1}},
		{"to the node itself", proxytest.FromNode, conntrack.TCP, "10.96.9.7:80", map[string]uint64{"pick": 1, "synack": 1, "fin": 1, "rst": 1}},
		{"pod to a server on the node", proxytest.FromPod, conntrack.TCP, "10.96.9.7:80", map[string]uint64{"pick": 1, "synack": 1, "fin": 1, "rst": 1}},
		{"affinity, new", proxytest.FromPod, conntrack.TCP, "10.96.9.2:80", map[string]uint64{"miss": 1, "pick": 1, "synack": 1, "fin": 1, "rst": 1}},
		{"affinity, hit", proxytest.FromPod, conntrack.TCP, "10.96.9.2:80", map[string]uint64{"pick": 1, "synack": 1, "fin": 1, "rst": 1}},
		{"rejected", proxytest.FromPod, conntrack.TCP, "10.96.9.3:80", map[string]uint64{"reject": 1}},
		{"rejected node port", proxytest.FromOutside, conntrack.TCP, "192.0.2.1:30201", map[string]uint64{"reject": 1}},
		{"rejected from the node", proxytest.FromNode, conntrack.TCP, "10.96.9.3:80", map[string]uint64{"reject": 1}},
		{"rejected node port from the node", proxytest.FromNode, conntrack.TCP, "192.0.2.1:30201", map[string]uint64{"reject": 1}},
		{"refused by the endpoint", proxytest.FromPod, conntrack.TCP, "10.96.9.4:80", map[string]uint64{"pick": 1, "rst": 1}},
		{"datagrams", proxytest.FromPod, conntrack.UDP, "10.96.9.5:53", map[string]uint64{"pick": 1, "reply": 1}},
		{"datagram refused by the endpoint", proxytest.FromPod, conntrack.UDP, "10.96.9.6:53", map[string]uint64{"pick": 1, "icmp": 1}},
		{"no Service's connection", proxytest.FromPod, conntrack.TCP, "10.244.1.2:8080", map[string]uint64{}},
		{"no Service's reset", proxytest.FromPod, conntrack.TCP, "10.244.1.2:9999", map[string]uint64{}},
		{"no Service's datagram", proxytest.FromPod, conntrack.UDP, "10.244.1.2:5353", map[string]uint64{}},
	}
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			w := proxytest.NewWorld(t, false)
			w.Serve(proxytest.FromNode)
			cfg := configFor(proxytest.Setup{ClusterCIDR: proxytest.ClusterCIDR})
			cfg.Flavour, cfg.Tools.Netns = flavour, w.Node.Fd()
			mustApply(t, New(cfg), services)
			before := reports(t, cfg)
			for _, tt := range tests {
				t.Run(tt.name, func(t *testing.T) {
					to := netip.MustParseAddrPort(tt.to)
					if tt.name == "datagrams" {
						exchange(t, w, tt.from, to)
					} else {
						w.From(tt.from, tt.kind, to, time.Second)
					}
					time.Sleep(5 * time.Millisecond) // for the last reset
					after := reports(t, cfg)
					got := map[string]uint64{}
					for kind, n := range after {
						if d := n - before[kind]; d > 0 {
							got[kind] = d
						}
					}
					before = after
					if d := cmp.Diff(tt.want, got); d != "" {
						t.Errorf("reports (-want +got):\n%s", d)
					}
				})
			}
		})
	}
}

// exchange sends three datagrams and waits for the answer to each.
func exchange(t *testing.T, w *proxytest.World, s proxytest.Source, to netip.AddrPort) {
	err := w.NS[s].Do(func() error {
		c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(to))
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(2 * time.Second))
		for range 3 {
			if _, err := c.Write([]byte("?")); err != nil {
				return err
			}
			if _, err := c.Read(make([]byte, 64)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

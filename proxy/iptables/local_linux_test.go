package iptables

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// TestLocalModes renders each detector, has the kernel take it and print it
// back, and asks what becomes of a pod's packet and of another.
func TestLocalModes(t *testing.T) {
	pods, others := netip.MustParseAddrPort("10.1.2.3:4000"), netip.MustParseAddrPort("192.0.2.7:4000")
	for _, tc := range []struct {
		mode        LocalMode
		iface, want string
		in, notIn   string
	}{
		{LocalClusterCIDR, "", "! -s 10.0.0.0/8 -d 172.30.0.41/32 -p tcp", "", ""},
		{"", "", "! -s 10.0.0.0/8 -d 172.30.0.41/32 -p tcp", "", ""},
		{LocalNodeCIDR, "", "! -s 10.1.0.0/16 -d 172.30.0.41/32 -p tcp", "", ""},
		{LocalBridge, "cbr0", "-d 172.30.0.41/32 ! -i cbr0 -p tcp", "cbr0", "eth0"},
		{LocalPrefix, "veth", "-d 172.30.0.41/32 ! -i veth+ -p tcp", "veth12", "eth0"},
	} {
		t.Run(string(tc.mode), func(t *testing.T) {
			eachFlavour(t, func(t *testing.T, cfg Config) {
				cfg.LocalMode, cfg.PodInterface = tc.mode, tc.iface
				s := overall()
				s.Node.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("fd00::/64"), netip.MustParsePrefix("10.1.0.0/16")}
				b := New(cfg)
				p := b.Render(s, proxy.Overlay{})
				if !strings.Contains(p.Text(), "-A KUBE-SVC-XPGD46QRK7WJZT7O "+tc.want+" ") {
					t.Errorf("no rule %q in\n%s", tc.want, p.Text())
				}
				if !strings.Contains(p.Text(), "pod traffic for ns2/svc2:p80 external destinations") {
					t.Error("no short way for pods to external addresses")
				}
				mustApply(t, b, s)
				pkt := proxy.Packet{Proto: conntrack.TCP, Src: pods, Dst: netip.MustParseAddrPort("172.30.0.41:80"), In: tc.in}
				if c := p.Walk(pkt).Choices; len(c) != 1 || c[0].Masquerade != "" {
					t.Errorf("pod: %+v", c)
				}
				pkt.Src, pkt.In = others, tc.notIn
				if c := p.Walk(pkt).Choices; len(c) != 1 || c[0].Masquerade != "not-local" {
					t.Errorf("other: %+v", c)
				}
			})
		})
	}
	t.Run("nothing to tell by", func(t *testing.T) {
		for _, mode := range []LocalMode{LocalNodeCIDR, LocalBridge, LocalPrefix} {
			cfg := overallConfig()
			cfg.LocalMode = mode
			if text := New(cfg).Render(overall(), proxy.Overlay{}).Text(); strings.Contains(text, "pod traffic for") {
				t.Errorf("%s tells by nothing", mode)
			}
		}
	})
}

// TestLargeCluster grows beyond 1,000 endpoints and shrinks again.
func TestLargeCluster(t *testing.T) {
	eachFlavour(t, func(t *testing.T, cfg Config) {
		b := New(cfg)
		for _, n := range []int{largeEndpoints, largeEndpoints + 1, largeEndpoints} {
			s := &proxy.Snapshot{}
			for i := range 100 {
				var eps []string
				for j := i; j < n; j += 100 {
					eps = append(eps, fmt.Sprintf("10.180.%d.%d:80", j/200, j%200+1))
				}
				s.Services = append(s.Services, service(fmt.Sprintf("ns/svc%d", i), "tcp", fmt.Sprintf("172.30.1.%d", i+1), 80, eps...))
			}
			mustApply(t, b, s)
			text := b.Render(s, proxy.Overlay{}).Text()
			if got, want := strings.Count(text, " -> "), n; n > largeEndpoints && got != 0 || n <= largeEndpoints && got != want {
				t.Errorf("%d endpoints: %d comments", n, got)
			}
			if !strings.Contains(text, `"ns/svc1 cluster IP"`) {
				t.Error("other comments are gone too")
			}
			out := b.Render(s, proxy.Overlay{}).Walk(proxy.Packet{Proto: conntrack.TCP, Src: netip.MustParseAddrPort("10.0.0.1:1"), Dst: netip.MustParseAddrPort("172.30.1.1:80")})
			for _, c := range out.Choices {
				for _, step := range c.Steps {
					if step.Text != "" && step.Purpose == "" {
						t.Errorf("no purpose for %q", step.Text)
					}
				}
			}
		}
	})
}

// TestSCTP programs SCTP beside TCP and UDP of the same address and port.
func TestSCTP(t *testing.T) {
	eachFlavour(t, func(t *testing.T, cfg Config) {
		s := &proxy.Snapshot{Node: proxy.Node{Addrs: ips("192.168.0.2")}}
		for i, proto := range []string{"sctp", "tcp", "udp"} {
			svc := service("ns1/svc1:p"+proto, proto, "172.30.0.41", 80, fmt.Sprintf("10.180.0.%d:80", i+1))
			svc.NodePort, svc.ExternalIPs = 3001, ips("192.168.99.22")
			s.Services = append(s.Services, svc)
		}
		empty := service("ns1/none", "sctp", "172.30.0.42", 80)
		empty.NodePort = 3002
		s.Services = append(s.Services, empty)
		b := New(cfg)
		if p := b.Render(s, proxy.Overlay{}); len(p.Problems()) > 0 {
			t.Error(p.Problems())
		}
		mustApply(t, b, s)
		p := b.Render(s, proxy.Overlay{})
		for _, to := range []string{"172.30.0.41:80", "192.168.99.22:80", "192.168.0.2:3001"} {
			for i, proto := range []conntrack.Proto{conntrack.SCTP, conntrack.TCP, conntrack.UDP} {
				out := p.Walk(proxy.Packet{Proto: proto, Src: netip.MustParseAddrPort("10.1.2.3:4000"), Dst: netip.MustParseAddrPort(to)})
				want := netip.MustParseAddrPort(fmt.Sprintf("10.180.0.%d:80", i+1))
				if _, ok := out.Find(want); !ok || len(out.Choices) != 1 {
					t.Errorf("%s %s: %+v, want %s", proto, to, out.Choices, want)
				}
			}
		}
		for _, to := range []string{"172.30.0.42:80", "192.168.0.2:3002"} {
			out := p.Walk(proxy.Packet{Proto: conntrack.SCTP, Src: netip.MustParseAddrPort("10.1.2.3:4000"), Dst: netip.MustParseAddrPort(to)})
			if out.Verdict != proxy.Reject {
				t.Errorf("%s: %s", to, out.Verdict)
			}
		}
	})
}

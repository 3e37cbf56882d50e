package iptables

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// dualStack is overall and a Service of both families.
func dualStack() *proxy.Snapshot {
	s := overall()
	six := service("ns1/svc1:p80", "tcp", "fd00:172:30::41", 80, "[fd00:10:180::1]:80", "[fd00:10:180::2]:80")
	six.NodePort, six.Affinity = 3005, time.Hour
	empty := service("ns6/svc6:p80", "tcp", "fd00:172:30::46", 80)
	s.Services = append(s.Services, six, empty)
	s.Node.Addrs = append(s.Node.Addrs, netip.MustParseAddr("fd00:192::2"))
	return s
}

func TestDual(t *testing.T) {
	eachFlavour(t, func(t *testing.T, cfg Config) {
		cfg.ClusterCIDRs = append(cfg.ClusterCIDRs, netip.MustParsePrefix("fd00:10::/32"))
		d := NewDual(cfg)
		for _, b := range []*Backend{d.v4, d.v6} {
			b.lookEvery = 50 * time.Millisecond
		}
		if _, reason, err := d.Preflight(t.Context()); err != nil || strings.Contains(reason, "IPv4 only") {
			t.Fatal(reason, err)
		}
		s := dualStack()
		p := d.Render(s, proxy.Overlay{})
		if len(p.Problems()) > 0 || !strings.Contains(p.Text(), "# ip6tables-restore\n") || strings.Count(p.Text(), "fd00:172:30::41/128") == 0 {
			t.Errorf("problems %v, text:\n%s", p.Problems(), p.Text())
		}
		rep, err := d.Apply(t.Context(), p)
		if err != nil || !rep.Full {
			t.Fatal(rep, err)
		}
		both := p.(*dualProgram)
		mustMatch(t, d.v4, both.v4)
		mustMatch(t, d.v6, both.v6)
		if rep, err := d.Apply(t.Context(), d.Render(s, proxy.Overlay{})); err != nil || rep.Commits != 0 {
			t.Errorf("no change: %+v %v", rep, err)
		}
		for dst, want := range map[string]string{"172.30.0.41:80": "10.180.0.1:80", "[fd00:172:30::41]:80": "[fd00:10:180::1]:80"} {
			to := netip.MustParseAddrPort(dst)
			out := p.Walk(proxy.Packet{Proto: 6, Src: netip.AddrPortFrom(to.Addr().Prev(), 4000), Dst: to})
			if _, ok := out.Find(netip.MustParseAddrPort(want)); !ok {
				t.Errorf("%s: %+v", dst, out)
			}
		}

		// Somebody flushes IPv6 only.
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- d.Watch(ctx, func(proxy.Drift) {
				d.Forget()
				if _, err := d.Apply(context.WithoutCancel(ctx), d.Render(s, proxy.Overlay{})); err != nil {
					t.Error(err)
				}
			})
		}()
		for open := false; !open; time.Sleep(time.Millisecond) {
			d.v6.apply.Lock()
			open = d.v6.watch != nil
			d.v6.apply.Unlock()
		}
		d.Forget()
		if _, err := d.Apply(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		six := d.v6.cfg
		restore6(t, six, "*nat\n-F KUBE-MARK-MASQ\nCOMMIT\n")
		for begin := time.Now(); d.v6.differs(t, both.v6); time.Sleep(20 * time.Millisecond) {
			if time.Since(begin) > 5*time.Second {
				t.Fatalf("not repaired: %+v", d.DriftStats())
			}
		}
		restore6(t, six, "*nat\n-R KUBE-MARK-MASQ 1 -j MARK --set-xmark 0x8000/0x8000\nCOMMIT\n")
		for begin := time.Now(); d.v6.differs(t, both.v6); time.Sleep(20 * time.Millisecond) {
			if time.Since(begin) > 5*time.Second {
				t.Fatalf("a changed rule is not repaired: %+v", d.DriftStats())
			}
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}

		if err := d.Cleanup(t.Context()); err != nil {
			t.Error(err)
		}
		for _, fa := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
			fl, _ := xtables.ParseFlavour(cfg.Flavour)
			text, err := cfg.Tools.SaveText(t.Context(), fl, fa, "", false)
			if err != nil || strings.Contains(text, "KUBE-") || strings.Contains(text, "KPTRACE") {
				t.Errorf("left in %s: %v\n%s", fa, err, text)
			}
		}
	})
}

// TestDualWithoutIPv6 runs where IPv6 is switched off.
func TestDualWithoutIPv6(t *testing.T) {
	ns := proxytest.NewNS(t)
	if err := ns.SetSysctl("net.ipv6.conf.all.disable_ipv6", "1"); err != nil {
		t.Fatal(err)
	}
	cfg := overallConfig()
	cfg.Flavour, cfg.Tools.Netns = "nft", ns.Fd()
	d := NewDual(cfg)
	if _, reason, err := d.Preflight(t.Context()); err != nil || !strings.Contains(reason, "IPv4 only: net.ipv6.conf.all.disable_ipv6 is 1") {
		t.Fatal(reason, err)
	}
	s := dualStack()
	if rep, err := d.Apply(t.Context(), d.Render(s, proxy.Overlay{})); err != nil || rep.Commits == 0 {
		t.Fatal(rep, err)
	}
	rs, err := cfg.Tools.Save(t.Context(), xtables.NFT, xtables.IPv6, "", false)
	if err != nil {
		t.Fatal(err)
	}
	if slices.ContainsFunc(rs.Tables, func(x *xtables.Table) bool { return x.Chain(chainServices) != nil }) {
		t.Error("IPv6 is programmed")
	}
}

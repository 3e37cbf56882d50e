package iptables

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// watched applies a Snapshot and lets Watch repair it until the test ends.
func watched(t *testing.T, cfg Config, s *proxy.Snapshot) (b *Backend, repairs *atomic.Int32) {
	t.Helper()
	b = New(cfg)
	b.lookEvery = 50 * time.Millisecond
	if _, _, err := b.Preflight(t.Context()); err != nil {
		t.Fatal(err)
	}
	repairs = new(atomic.Int32)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- b.Watch(ctx, func(proxy.Drift) {
			b.Forget()
			if _, err := b.Apply(ctx, b.Render(s, proxy.Overlay{})); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
			repairs.Add(1)
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	for open := false; !open; time.Sleep(time.Millisecond) {
		b.apply.Lock()
		open = b.watch != nil
		b.apply.Unlock()
	}
	mustApply(t, b, s)
	return b, repairs
}

// differs reports whether the kernel does not hold p.
func (b *Backend) differs(t *testing.T, p proxy.Program) bool {
	t.Helper()
	have, err := b.runner.Save(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	return len(Diff(have, p)) > 0
}

// TestDrift changes rules from outside in every way and table.
func TestDrift(t *testing.T) {
	drifts := map[string]string{
		"nat chain flushed":      "*nat\n-F KUBE-SVC-XPGD46QRK7WJZT7O\nCOMMIT\n",
		"nat table flushed":      "*nat\n-F\nCOMMIT\n",
		"nat chain deleted":      "*nat\n-F KUBE-SEP-SXIVWICOYRO3J4NJ\n-F KUBE-SVC-XPGD46QRK7WJZT7O\n-X KUBE-SEP-SXIVWICOYRO3J4NJ\nCOMMIT\n",
		"nat empty chain":        "*nat\n-X KUBE-PROXY-CANARY\nCOMMIT\n",
		"nat rule removed":       "*nat\n-D KUBE-MARK-MASQ 1\nCOMMIT\n",
		"nat rule changed":       "*nat\n-R KUBE-MARK-MASQ 1 -j MARK --set-xmark 0x8000/0x8000\nCOMMIT\n",
		"nat rule added":         "*nat\n-I KUBE-SERVICES -d 1.1.1.1/32 -j ACCEPT\nCOMMIT\n",
		"nat jump removed":       "*nat\n-F PREROUTING\nCOMMIT\n",
		"nat all deleted":        "*nat\n-F\n-X\nCOMMIT\n",
		"filter chain flushed":   "*filter\n-F KUBE-FORWARD\nCOMMIT\n",
		"filter chain deleted":   "*filter\n-F\n-X\nCOMMIT\n",
		"filter rule removed":    "*filter\n-D KUBE-FORWARD 2\nCOMMIT\n",
		"filter rule changed":    "*filter\n-R KUBE-FORWARD 1 -m conntrack --ctstate UNTRACKED -j DROP\nCOMMIT\n",
		"filter shared rule":     "*filter\n-D KUBE-FIREWALL 1\nCOMMIT\n",
		"mangle chain flushed":   "*mangle\n-F KPTRACE\nCOMMIT\n",
		"mangle chain deleted":   "*mangle\n-F\n-X\nCOMMIT\n",
		"mangle rule removed":    "*mangle\n-D KPTRACE 2\nCOMMIT\n",
		"mangle rule changed":    "*mangle\n-R KPTRACE 1 -m conntrack ! --ctstate SNAT -j RETURN\nCOMMIT\n",
		"mangle jump removed":    "*mangle\n-D PREROUTING 1\nCOMMIT\n",
		"mangle canary replaced": "*mangle\n-X KUBE-PROXY-CANARY\n:KUBE-PROXY-CANARY - [0:0]\n-A KUBE-PROXY-CANARY -j RETURN\nCOMMIT\n",
	}
	eachFlavour(t, func(t *testing.T, base Config) {
		for name, text := range drifts {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				cfg := base
				cfg.Tools.Netns = proxytest.NewNS(t).Fd()
				b, _ := watched(t, cfg, overall())
				p := b.Render(overall(), proxy.Overlay{})
				if base.Flavour == "legacy" {
					time.Sleep(200 * time.Millisecond) // it has been looked at once
				}
				restore(t, cfg, text)
				start := time.Now()
				for b.differs(t, p) {
					if time.Since(start) > 5*time.Second {
						t.Fatalf("not repaired: %+v", b.DriftStats())
					}
					time.Sleep(50 * time.Millisecond)
				}
				t.Logf("repaired after %v: %s", time.Since(start).Round(time.Millisecond), b.DriftStats().LastWhat)
			})
		}
	})
}

// TestNoDrift makes changes of our own, and such of others that do not concern
// us; neither may be taken for drift of our rules.
func TestNoDrift(t *testing.T) {
	eachFlavour(t, func(t *testing.T, cfg Config) {
		t.Parallel()
		cfg.Tools.Netns = proxytest.NewNS(t).Fd()
		s := overall()
		b, repairs := watched(t, cfg, s)
		for i := range 10 {
			s.Services[0] = service("ns1/svc1:p80", "tcp", "172.30.0.41", 80, fmt.Sprintf("10.180.0.%d:80", i+1))
			if rep := mustApply(t, b, s); i > 0 && rep.Full {
				t.Errorf("%+v", rep)
			}
			time.Sleep(60 * time.Millisecond)
		}
		if cfg.Flavour == "nft" {
			restore(t, cfg, "*nat\n:OTHER - [0:0]\n-A OTHER -j RETURN\n-I PREROUTING -j OTHER\nCOMMIT\n*raw\n-A PREROUTING -j ACCEPT\nCOMMIT\n")
			restore(t, cfg, "*nat\n-D PREROUTING -j OTHER\n-F OTHER\n-X OTHER\nCOMMIT\n")
		} else {
			restore(t, cfg, "*raw\n-A PREROUTING -j ACCEPT\nCOMMIT\n")
		}
		time.Sleep(1500 * time.Millisecond)
		if st := b.DriftStats(); st.Certain != 0 || st.Doubts != 0 || repairs.Load() != 0 {
			t.Errorf("%d repairs, %+v", repairs.Load(), st)
		}
	})
}

// TestDriftWhileWriting has somebody write between our commits.
func TestDriftWhileWriting(t *testing.T) {
	cfg := overallConfig()
	cfg.Flavour, cfg.Tools.Netns = "nft", proxytest.NewNS(t).Fd()
	b, repairs := watched(t, cfg, overall())
	b.apply.Lock()
	b.watch.Pause(false)
	restore(t, cfg, "*nat\n-F KUBE-SVC-XPGD46QRK7WJZT7O\nCOMMIT\n")
	b.watch.Settle(0)
	b.apply.Unlock()
	p := b.Render(overall(), proxy.Overlay{})
	for start := time.Now(); b.differs(t, p); time.Sleep(20 * time.Millisecond) {
		if time.Since(start) > 5*time.Second {
			t.Fatal("not repaired")
		}
	}
	if repairs.Load() == 0 || b.DriftStats().Doubts == 0 {
		t.Errorf("%d repairs, %+v", repairs.Load(), b.DriftStats())
	}
}

package userspace

import (
	"context"
	"net/netip"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// TestDrift changes rules from outside: they are put right, and changes of our
// own and of others' rules are not taken for it.
func TestDrift(t *testing.T) {
	t.Parallel()
	drifts := map[string]string{
		"chain flushed": "*nat\n-F KUBE-PORTALS-HOST\nCOMMIT\n",
		"rule added":    "*nat\n-I KUBE-PORTALS-CONTAINER -d 1.1.1.1/32 -j ACCEPT\nCOMMIT\n",
		"jumps removed": "*nat\n-F PREROUTING\n-F OUTPUT\nCOMMIT\n",
		"filter gone":   "*filter\n-F\n-X\nCOMMIT\n",
	}
	for _, flavour := range []string{"nft", "legacy"} {
		for name, text := range drifts {
			t.Run(flavour+" "+name, func(t *testing.T) {
				t.Parallel()
				cfg := Config{Flavour: flavour}
				cfg.Tools.Netns = proxytest.NewNS(t).Fd()
				b := start(t, cfg)
				p := b.Render(&proxy.Snapshot{Node: proxytest.Node(), Services: []proxy.Service{
					serviceOf("a", false, vip, netip.MustParseAddrPort("127.0.1.1:80")), serviceOf("empty", false, "10.96.0.11:80"),
				}}, proxy.Overlay{})
				apply := func() {
					t.Helper()
					if _, err := b.Apply(t.Context(), p); err != nil {
						t.Fatal(err)
					}
				}
				apply()
				want := b.text(t)
				repairs := make(chan proxy.Drift, 100)
				ctx, cancel := context.WithCancel(t.Context())
				ended := make(chan error, 1)
				go func() { ended <- b.Watch(ctx, func(d proxy.Drift) { repairs <- d }) }()
				if d := <-repairs; d.Certain { // nobody watched until now
					t.Errorf("at first: %+v", d)
				}
				apply()
				b.restore(t, "*nat\n:OTHER - [0:0]\n-A OTHER -j RETURN\nCOMMIT\n")
				b.restore(t, text)
				if b.text(t) == want {
					t.Fatal("nothing was changed")
				}
				d := <-repairs
				if flavour == "nft" && !d.Certain {
					t.Errorf("not sure: %+v", d)
				}
				b.Forget()
				apply()
				if got := b.text(t); got != want {
					t.Errorf("after %+v:\n%s\nwant:\n%s", d, got, want)
				}
				cancel()
				if err := <-ended; err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestNoDrift changes Services all the time, and what is not ours.
func TestNoDrift(t *testing.T) {
	t.Parallel()
	p := newPlace(t, Config{})
	one := p.named("127.0.1.1:0", "one")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	p.must(p.apply())
	begun := make(chan struct{}, 100)
	go func() { ended <- p.b.Watch(ctx, func(proxy.Drift) { begun <- struct{}{} }) }()
	<-begun
	for i := range 20 {
		p.must(p.apply(serviceOf("a", false, []string{vip, "10.96.0.11:80"}[i%2], one)))
		if i%5 == 0 {
			p.b.restore(t, "*nat\n:OTHER - [0:0]\n-A OTHER -j RETURN\nCOMMIT\n")
		}
		if d, _ := p.b.look(); d.What != "" {
			t.Errorf("%+v", d)
		}
	}
	cancel()
	p.must(<-ended)
}

// restore gives a text to iptables-restore --noflush.
func (b *Backend) restore(t *testing.T, text string) {
	t.Helper()
	if _, err := exec.Run(t.Context(), exec.Spec{Path: "iptables-" + b.flavour.String() + "-restore", Args: []string{"--noflush"},
		Stdin: strings.NewReader(text), Netns: b.cfg.Tools.Netns}); err != nil {
		t.Fatal(err)
	}
}

// text is our chains as the kernel has them, and the jumps to them.
func (b *Backend) text(t *testing.T) string {
	t.Helper()
	b.apply.Lock()
	defer b.apply.Unlock()
	have, err := b.kernel[xtables.IPv4].runner.Save(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, table := range have.Tables {
		for _, c := range table.Chains {
			if owned(table.Name, c.Name) {
				out.WriteString(":" + c.Name + "\n")
			}
			for _, r := range c.Rules {
				if owned(table.Name, c.Name) || ourJump(table.Name, r) {
					out.WriteString(c.Name + " " + r.String() + "\n")
				}
			}
		}
	}
	return out.String()
}

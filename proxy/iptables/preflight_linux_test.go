package iptables

import (
	"strings"
	"testing"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

func TestPreflight(t *testing.T) {
	eachFlavour(t, func(t *testing.T, cfg Config) {
		other := map[string]string{"nft": "legacy", "legacy": "nft"}[cfg.Flavour]
		flavour, reason, err := New(cfg).Preflight(t.Context())
		if flavour != cfg.Flavour || reason != "as configured" || err != nil {
			t.Errorf("empty host: %q, %q, %v", flavour, reason, err)
		}
		mustApply(t, New(cfg), overall())

		auto := cfg
		auto.Flavour = "auto"
		flavour, reason, err = New(auto).Preflight(t.Context())
		if flavour != cfg.Flavour || !strings.Contains(reason, "rules") || err != nil {
			t.Errorf("auto: %q, %q, %v; want the flavour that has rules", flavour, reason, err)
		}

		wrong := cfg
		wrong.Flavour = other
		b := New(wrong)
		if _, _, err := b.Preflight(t.Context()); err == nil || !strings.Contains(err.Error(), "KUBE-") {
			t.Errorf("the other flavour: error %v, want a refusal that names a chain", err)
		}
		if _, err := b.Apply(t.Context(), b.Render(overall(), proxy.Overlay{})); err == nil {
			t.Error("Apply goes on where Preflight refuses")
		}
		if got := save(t, wrong); strings.Contains(got, "KUBE-SVC") {
			t.Errorf("a refused start wrote rules:\n%s", got)
		}
		wrong.TakeOver = true
		mustApply(t, New(wrong), overall())
		if err := New(cfg).Cleanup(t.Context()); err != nil {
			t.Error(err)
		}
		for _, c := range []Config{cfg, wrong} {
			if got := save(t, c); strings.Contains(got, "KUBE-") {
				t.Errorf("%s: left behind:\n%s", c.Flavour, got)
			}
		}
	})
	if _, _, err := New(Config{Flavour: "ebpf"}).Preflight(t.Context()); err == nil || !strings.Contains(err.Error(), "ebpf") {
		t.Errorf("unknown flavour: %v", err)
	}
	missing := Config{Flavour: "nft", Tools: xtables.Tools{Dir: t.TempDir()}}
	if _, _, err := New(missing).Preflight(t.Context()); err == nil {
		t.Error("no error where iptables is not installed")
	}
}

package iptables

import (
	"context"
	"fmt"

	"github.com/kptrace/kptrace/internal/xtables"
)

// Preflight settles the flavour and says which and why. It refuses where
// Service chains are live in the other flavour, for a packet would pass both,
// unless Config.TakeOver is set. It writes nothing. Apply calls it if nobody
// did.
func (b *Backend) Preflight(ctx context.Context) (flavour, reason string, err error) {
	b.apply.Lock()
	defer b.apply.Unlock()
	return b.preflight(ctx)
}

func (b *Backend) preflight(ctx context.Context) (flavour, reason string, err error) {
	fl, reason, err := b.choose(ctx)
	if err != nil {
		return "", "", fmt.Errorf("proxy/iptables: choosing a flavour: %w", err)
	}
	other, err := b.cfg.Tools.Survey(ctx, fl.Other(), b.cfg.Family)
	if err != nil {
		return "", "", fmt.Errorf("proxy/iptables: looking at iptables-%s: %w", fl.Other(), err)
	}
	if n := len(other.Live); n > 0 && !b.cfg.TakeOver {
		return "", "", fmt.Errorf("proxy/iptables: iptables-%s was chosen (%s), but iptables-%s has %d live chains of a kube-proxy, such as %s, "+
			"and a packet would pass both: stop what wrote them and clean up, choose that flavour, or take over",
			fl, reason, fl.Other(), n, other.Live[0])
	}
	b.flavour = fl
	b.runner = xtables.NewRunner(xtables.RunnerConfig{Tools: b.cfg.Tools, Flavour: fl, Family: b.cfg.Family})
	return fl.String(), reason, nil
}

// choose picks the flavour.
func (b *Backend) choose(ctx context.Context) (xtables.Flavour, string, error) {
	if b.cfg.Flavour == "auto" {
		return b.cfg.Tools.Detect(ctx)
	}
	fl, err := xtables.ParseFlavour(b.cfg.Flavour)
	if err != nil {
		return 0, "", err
	}
	_, err = b.cfg.Tools.Version(ctx, fl, b.cfg.Family)
	return fl, "as configured", err
}

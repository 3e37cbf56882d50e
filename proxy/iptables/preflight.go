package iptables

import (
	"context"
	"fmt"
	"slices"

	"github.com/kptrace/kptrace/internal/xtables"
)

// Preflight settles the flavour and says which and why. It refuses where
// Service chains are live in the other flavour, for a packet would pass both,
// unless Config.TakeOver is set. It writes nothing.
func (b *Backend) Preflight(ctx context.Context) (flavour, reason string, err error) {
	b.apply.Lock()
	defer b.apply.Unlock()
	return b.preflight(ctx)
}

func (b *Backend) preflight(ctx context.Context) (flavour, reason string, err error) {
	fl, reason, err := b.choose(ctx)
	if err != nil {
		return "", "", err
	}
	if chains, err := b.liveChains(ctx, fl.Other()); err == nil && len(chains) > 0 && !b.cfg.TakeOver {
		return "", "", fmt.Errorf("proxy/iptables: %d Service chains such as %s are live in iptables-%s, and a packet would pass both: "+
			"stop what wrote them and clean up, use that flavour, or take over", len(chains), chains[0], fl.Other())
	}
	b.flavour = fl
	b.runner = xtables.NewRunner(xtables.RunnerConfig{Tools: b.cfg.Tools, Flavour: fl, Family: b.cfg.Family})
	return fl.String(), reason, nil
}

// choose picks the flavour.
func (b *Backend) choose(ctx context.Context) (xtables.Flavour, string, error) {
	if b.cfg.Flavour != "auto" {
		fl, err := xtables.ParseFlavour(b.cfg.Flavour)
		if err != nil {
			return 0, "", fmt.Errorf("proxy/iptables: %w", err)
		}
		if _, err := b.cfg.Tools.Version(ctx, fl, b.cfg.Family); err != nil {
			return 0, "", fmt.Errorf("proxy/iptables: %w", err)
		}
		return fl, "as configured", nil
	}
	return 0, "", fmt.Errorf("proxy/iptables: no flavour")
}

// liveChains lists the Service chains in nat of a flavour.
func (b *Backend) liveChains(ctx context.Context, fl xtables.Flavour) ([]string, error) {
	rs, err := b.cfg.Tools.Save(ctx, fl, b.cfg.Family, "", false)
	if err != nil {
		return nil, err
	}
	var names []string
	if t := rs.Table("nat"); t != nil {
		for _, c := range t.Chains {
			if isServiceChain(c.Name) {
				names = append(names, c.Name)
			}
		}
	}
	slices.Sort(names)
	return names, nil
}

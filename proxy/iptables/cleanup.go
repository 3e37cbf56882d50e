package iptables

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/kptrace/kptrace/internal/xtables"
)

// Cleanup removes everything the mode ever writes, in both flavours, and
// nothing else: jump rules by their exact text, then our chains. It may be
// called again and again. What the kubelet shares stays while a kubelet has its
// chains there (KUBE-FIREWALL is its too). A chain of ours that somebody else's
// rule leads to stays as well, and is an error that names it.
//
// A flavour that cannot be read where the other one can was never written by
// us, for we read before we write: its module is not loaded, or the namespace
// is one in which the kernel keeps it from everybody.
func (b *Backend) Cleanup(ctx context.Context) error {
	b.apply.Lock()
	defer b.apply.Unlock()
	b.applied = nil
	var errs, unread []error
	read := false
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		have, err := b.cfg.Tools.Save(ctx, fl, b.cfg.Family, "", false)
		switch {
		case errors.Is(err, fs.ErrNotExist): // not installed, so never written
		case err != nil && b.runner != nil && b.flavour == fl:
			errs = append(errs, cleanupError(fl, err))
		case err != nil:
			unread = append(unread, cleanupError(fl, err))
		default:
			read = true
			if err := b.clean(ctx, fl, have); err != nil {
				errs = append(errs, cleanupError(fl, err))
			}
		}
	}
	if !read {
		errs = append(errs, unread...)
	}
	errs = append(errs, b.inNetns(deleteCounters))
	return errors.Join(errs...)
}

func cleanupError(fl xtables.Flavour, err error) error {
	return fmt.Errorf("proxy/iptables: cleaning up iptables-%s: %w", fl, err)
}

func (b *Backend) clean(ctx context.Context, fl xtables.Flavour, have *xtables.Ruleset) error {
	plan, errs := cleanupPlan(have)
	if !planEmpty(plan) {
		runner := xtables.NewRunner(xtables.RunnerConfig{Tools: b.cfg.Tools, Flavour: fl, Family: b.cfg.Family})
		rep, err := runner.Apply(ctx, plan)
		if err != nil {
			errs = append(errs, err)
		}
		for i := range rep.Failed {
			errs = append(errs, &rep.Failed[i])
		}
	}
	return errors.Join(errs...)
}

// cleanupPlan lists what to remove. The errors name what must stay.
func cleanupPlan(have *xtables.Ruleset) (xtables.Plan, []error) {
	l := newLive(xtables.List(have))
	jumps := xtables.Phase{Name: "jumps"}
	chains := xtables.Phase{Name: "chains"}
	kubelet := have.Chain("mangle", "KUBE-KUBELET-CANARY") != nil || have.Chain("mangle", "KUBE-IPTABLES-HINT") != nil
	mine := func(table, chain string) bool { return owned(table, chain) }
	if c := have.Chain("filter", chainFirewall); c != nil && !kubelet &&
		(len(c.Rules) == 0 || len(c.Rules) == 1 && c.Rules[0].String() == localnetRule) {
		mine = func(table, chain string) bool {
			return owned(table, chain) || table == "filter" && chain == chainFirewall
		}
	}
	known := knownJumps(have.Family)
	var errs []error
	for _, t := range have.Tables {
		var lines []string
		for _, j := range known {
			if j.table == t.Name && mine(t.Name, j.to) {
				_, times := l.stands(j.table, j.chain, j.rule)
				lines = append(lines, slices.Repeat([]string{"-D " + j.chain + " " + j.rule}, times)...)
			}
		}
		if len(lines) > 0 {
			jumps.Units = append(jumps.Units, xtables.Unit{Table: t.Name, Owner: "jumps", Lines: lines})
		}
		keep := usedByOthers(t, mine, known)
		for _, from := range keep {
			errs = append(errs, fmt.Errorf("%s stays: %s", from.chain, from.why))
		}
		for _, name := range deletable(t, mine) {
			if !slices.ContainsFunc(keep, func(k kept) bool { return k.chain == name }) {
				chains.Units = append(chains.Units, xtables.Unit{Table: t.Name, Owner: "chain " + name,
					Lines: []string{":" + name + " - [0:0]", "-X " + name}})
			}
		}
	}
	return xtables.Plan{jumps, chains}, errs
}

// owned reports whether a chain is ours alone.
func owned(table, chain string) bool {
	switch chain {
	case chainServices, chainNodePorts:
		return table == "filter" || table == "nat"
	case chainExternalServices, chainProxyFirewall, chainForward:
		return table == "filter"
	case chainPostrouting, chainMarkMasq, chainReroute:
		return table == "nat"
	case chainCanary:
		return table == "filter" || table == "nat" || table == "mangle"
	case chainTrace:
		return table == "mangle"
	}
	return table == "nat" && isServiceChain(chain)
}

// kept is a chain that cannot be removed, and why.
type kept struct{ chain, why string }

// usedByOthers lists our chains to which rules of others lead.
func usedByOthers(t *xtables.Table, mine func(table, chain string) bool, known []jumpRule) []kept {
	var out []kept
	for _, c := range t.Chains {
		if mine(t.Name, c.Name) {
			continue
		}
		for _, r := range c.Rules {
			if r.Target == "" || !mine(t.Name, r.Target) {
				continue
			}
			text := r.String()
			if !slices.ContainsFunc(known, func(j jumpRule) bool { return j.table == t.Name && j.chain == c.Name && j.rule == text }) {
				out = append(out, kept{r.Target, fmt.Sprintf("the rule %q in %s %s, which is not ours, leads to it", text, t.Name, c.Name)})
			}
		}
	}
	// What a chain that stays leads to must stay too.
	for i := 0; i < len(out); i++ {
		if c := t.Chain(out[i].chain); c != nil {
			for _, r := range c.Rules {
				if r.Target != "" && mine(t.Name, r.Target) && !slices.ContainsFunc(out, func(k kept) bool { return k.chain == r.Target }) {
					out = append(out, kept{r.Target, "it is used by " + out[i].chain})
				}
			}
		}
	}
	return out
}

// deletable lists our chains in a table, those that lead to others first.
func deletable(t *xtables.Table, mine func(table, chain string) bool) []string {
	var names []string
	for _, c := range t.Chains {
		if mine(t.Name, c.Name) {
			names = append(names, c.Name)
		}
	}
	order := [...]string{chainReroute, chainServices, chainNodePorts, prefixFirewall, prefixExternal, prefixService, prefixLocal, prefixEndpoint}
	rank := func(name string) int {
		for i, p := range order {
			if strings.HasPrefix(name, p) {
				return i
			}
		}
		return len(order)
	}
	slices.SortStableFunc(names, func(a, b string) int { return rank(a) - rank(b) })
	return names
}

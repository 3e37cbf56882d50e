package e2e

import (
	"fmt"
	"slices"
	"strings"

	"github.com/kptrace/kptrace/internal/xtables"
)

// What of our rules is our own and not kube-proxy's.
const (
	ownPrefix = "kp1:"    // of the NFLOG rules
	ownChain  = "KPTRACE" // and the jumps to it
)

// strip removes our own rules from what iptables-save printed.
func strip(rs *xtables.Ruleset) *xtables.Ruleset {
	out := &xtables.Ruleset{Family: rs.Family}
	for _, t := range rs.Tables {
		into := out.Ensure(t.Name)
		for _, c := range t.Chains {
			if c.Name == ownChain {
				continue
			}
			chain := into.Ensure(c.Name, c.Policy)
			for _, r := range c.Rules {
				if !own(r) {
					chain.Add(r)
				}
			}
		}
	}
	return out
}

func own(r *xtables.Rule) bool {
	prefix, _ := r.TargetOpt("nflog-prefix")
	return r.Target == "NFLOG" && strings.HasPrefix(prefix, ownPrefix) || r.Target == ownChain
}

// comparison is what compare found.
type comparison struct {
	// chains and rules were compared, those of built-in chains included.
	chains, rules int
	// differences has one line for each.
	differences []string
}

// String is the verdict in one line, or all differences.
func (c comparison) String() string {
	if len(c.differences) == 0 {
		return fmt.Sprintf("identical: %d chains, %d rules", c.chains, c.rules)
	}
	return strings.Join(c.differences, "\n")
}

// compare holds our rules, stripped, against those of upstream kube-proxy:
// every table, chain, policy and rule, in order.
//
// Upstream walks Services in random order, so chains that all Services share
// are compared Service by Service: in order in KUBE-PROXY-FIREWALL; in the
// others in order for each of its addresses, for packets to different addresses
// never meet the same rule. The rules for node ports must be last in nat
// KUBE-SERVICES.
func compare(ours, upstream *xtables.Ruleset) comparison {
	ours, upstream = sorted(strip(ours)), sorted(upstream)
	var c comparison
	for _, t := range upstream.Tables {
		c.chains += len(t.Chains)
		for _, chain := range t.Chains {
			c.rules += len(chain.Rules)
		}
	}
	all := func(string, string) bool { return true }
	for _, d := range xtables.Diff(ours, upstream, all) {
		c.note(d)
	}
	for _, t := range slices.Concat(upstream.Tables, ours.Tables) {
		if a, b := ours.Table(t.Name), upstream.Table(t.Name); (a == nil) != (b == nil) && len(t.Chains) > 0 {
			c.differences = append(c.differences, fmt.Sprintf("%s: one has this table, the other has not", t.Name))
		}
	}
	return c
}

func (c *comparison) note(d xtables.ChainDiff) {
	if d.Kind == xtables.Same {
		return
	}
	add := func(format string, args ...any) {
		c.differences = append(c.differences, d.Table+" "+d.Chain+": "+fmt.Sprintf(format, args...))
	}
	switch d.Kind {
	case xtables.Missing:
		add("ours has no such chain")
	case xtables.Extra:
		add("upstream has no such chain")
	}
	if d.Policy != "" {
		add("upstream's policy is %s", d.Policy)
	}
	for _, r := range d.Add {
		add("upstream only, rule %d: %s", r.Index, r.Rule)
	}
	for _, r := range d.Remove {
		add("ours only, rule %d: %s", r.Index, r.Rule)
	}
	if d.Moved {
		add("the same rules in another order")
	}
}

// shared are the chains in which every Service may have rules.
func shared(table, chain string) bool {
	switch chain {
	case "KUBE-SERVICES", "KUBE-NODEPORTS":
		return table == "nat" || table == "filter"
	case "KUBE-EXTERNAL-SERVICES", "KUBE-PROXY-FIREWALL":
		return table == "filter"
	}
	return false
}

// sorted brings the Services in shared chains into one order and leaves the
// rules of each of them as they are. Rules for node ports, one for each address
// with --nodeport-addresses and then in random order, are sorted only if
// nothing stands behind them.
func sorted(rs *xtables.Ruleset) *xtables.Ruleset {
	out := &xtables.Ruleset{Family: rs.Family}
	for _, t := range rs.Tables {
		into := out.Ensure(t.Name)
		for _, c := range t.Chains {
			rules := slices.Clone(c.Rules)
			if shared(t.Name, c.Name) {
				services := rules
				for len(services) > 0 && toNodePorts(services[len(services)-1]) {
					services = services[:len(services)-1]
				}
				slices.SortStableFunc(services, func(a, b *xtables.Rule) int { return strings.Compare(block(c.Name, a), block(c.Name, b)) })
				slices.SortFunc(rules[len(services):], func(a, b *xtables.Rule) int { return strings.Compare(a.String(), b.String()) })
			}
			into.Ensure(c.Name, c.Policy).Rules = rules
		}
	}
	return out
}

func toNodePorts(r *xtables.Rule) bool { return r.Target == "KUBE-NODEPORTS" }

// block names the rules of a shared chain whose order among each other counts:
// those of one port of one Service, of which only the protocol is not in the
// comment, for one address.
func block(chain string, r *xtables.Rule) string {
	name, _, _ := strings.Cut(r.Comment(), " ")
	name += "/" + r.Proto.Name
	switch chain {
	case "KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES":
		name += "/" + r.Dst.Prefix.String()
	}
	return name
}

package xtables

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
)

// Survey is what one flavour holds for one family.
type Survey struct {
	// Rules is the number of rules in all tables.
	Rules int
	// Hints are the chains by which kubelet shows which flavour the node
	// uses (KEP-3178).
	Hints []string
	// Live are the chains of a kube-proxy that packets can reach, as
	// "nat/KUBE-SERVICES".
	Live []string
	// Unavailable says why nothing could be read: the program is absent, the
	// kernel has no ip_tables, we may not. The flavour then counts as empty.
	Unavailable string
}

// Survey reads all tables of one flavour and family. It makes no table: nft
// tables are only looked at, and of legacy only those are read that exist
// (/proc/net/ip_tables_names). Only the end of ctx and a text that cannot be
// read are errors.
func (t *Tools) Survey(ctx context.Context, fl Flavour, fa Family) (Survey, error) {
	text, err := t.SaveText(ctx, fl, fa, "", false)
	if err != nil {
		if ctx.Err() != nil {
			return Survey{}, err
		}
		return Survey{Unavailable: err.Error()}, nil
	}
	rs, err := Parse(fa, text)
	if err != nil {
		return Survey{}, fmt.Errorf("xtables: reading %s: %w", Program(fl, fa, "save"), err)
	}
	s := Survey{Rules: rs.Rules(), Live: LiveKube(rs)}
	s.Hints = hints(rs)
	return s, nil
}

func hints(rs *Ruleset) []string {
	var found []string
	for _, name := range [...]string{"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"} {
		if rs.Chain("mangle", name) != nil {
			found = append(found, name)
		}
	}
	return found
}

// Detect tells which flavour this node uses, as kubernetes-sigs/iptables-wrappers
// does: kubelet's hint chains in nft, then in legacy, of either family; else the
// flavour with more rules; else what the program "iptables" is; else nft. The
// reason is for people. It is an error if neither flavour is installed.
func (t *Tools) Detect(ctx context.Context) (Flavour, string, error) {
	// First the table mangle of nft alone, where the answer mostly is: all
	// tables of a large cluster take seconds.
	for _, fa := range []Family{IPv4, IPv6} {
		if rs, err := t.Save(ctx, NFT, fa, "mangle", false); err == nil {
			if found := hints(rs); len(found) > 0 {
				return NFT, hintReason(found[0], NFT, fa), nil
			}
		}
	}
	var rules [2]int
	var installed [2]bool
	var missing []error
	for _, fl := range []Flavour{NFT, Legacy} {
		if _, err := t.Version(ctx, fl, IPv4); err != nil {
			if ctx.Err() != nil {
				return 0, "", err
			}
			missing = append(missing, err)
			continue
		}
		installed[fl] = true
		for _, fa := range []Family{IPv4, IPv6} {
			s, err := t.Survey(ctx, fl, fa)
			if err != nil {
				return 0, "", err
			}
			if len(s.Hints) > 0 {
				return fl, hintReason(s.Hints[0], fl, fa), nil
			}
			rules[fl] += s.Rules
		}
	}
	switch {
	case !installed[NFT] && !installed[Legacy]:
		return 0, "", fmt.Errorf("xtables: iptables is not installed: %w", errors.Join(missing...))
	case !installed[NFT]:
		return Legacy, Program(NFT, IPv4, "") + " is not installed", nil
	case !installed[Legacy]:
		return NFT, Program(Legacy, IPv4, "") + " is not installed", nil
	case rules[NFT] != rules[Legacy]:
		more := NFT
		if rules[Legacy] > rules[NFT] {
			more = Legacy
		}
		return more, fmt.Sprintf("%s has %d rules, %s has %d", more, rules[more], more.Other(), rules[more.Other()]), nil
	}
	return t.alternative(ctx)
}

func hintReason(chain string, fl Flavour, fa Family) string {
	return fmt.Sprintf("kubelet's chain %s is in %s (%v)", chain, fl, fa)
}

// alternative tells which flavour the program "iptables" is.
func (t *Tools) alternative(ctx context.Context) (Flavour, string, error) {
	out, err := t.run(ctx, "iptables", "-V")
	switch {
	case strings.Contains(out, "(nf_tables)"):
		return NFT, "iptables is " + strings.TrimSpace(out), nil
	case strings.Contains(out, "(legacy)"):
		return Legacy, "iptables is " + strings.TrimSpace(out), nil
	case errors.Is(err, fs.ErrNotExist):
		return NFT, "nothing speaks for either flavour", nil
	case err != nil:
		return NFT, "nothing speaks for either flavour: " + err.Error(), ctx.Err()
	}
	return Legacy, "iptables is older than 1.8: " + strings.TrimSpace(out), nil
}

// LiveKube returns the chains of a kube-proxy of any mode that packets can
// reach from a built-in chain, as "nat/KUBE-SERVICES", in the order of the
// ruleset. Chains that kubelet makes, and leftovers nothing jumps to, are not
// among them.
func LiveKube(rs *Ruleset) []string {
	var live []string
	for _, t := range rs.Tables {
		seen := make(map[string]bool)
		var queue []*Chain
		for _, c := range t.Chains {
			if isBuiltin(t.Name, c.Name) {
				queue = append(queue, c)
			}
		}
		for len(queue) > 0 {
			c := queue[0]
			queue = queue[1:]
			for _, r := range c.Rules {
				if next := t.Chain(r.Target); next != nil && !seen[next.Name] {
					seen[next.Name] = true
					queue = append(queue, next)
				}
			}
		}
		for _, c := range t.Chains {
			if seen[c.Name] && isKubeProxy(c.Name) {
				live = append(live, t.Name+"/"+c.Name)
			}
		}
	}
	return live
}

// kubeNames are the chains with fixed names that only a kube-proxy makes;
// KUBE-POSTROUTING, KUBE-MARK-MASQ and KUBE-FIREWALL can be kubelet's.
var kubeNames = []string{
	"KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS", "KUBE-PROXY-FIREWALL", "KUBE-FORWARD",
	"KUBE-NODE-PORT", "KUBE-LOAD-BALANCER", "KUBE-IPVS-FILTER", "KUBE-IPVS-OUT-FILTER",
	"KUBE-SOURCE-RANGES-FIREWALL", "KUBE-PORTALS-CONTAINER", "KUBE-PORTALS-HOST",
	"KUBE-NODEPORT-CONTAINER", "KUBE-NODEPORT-HOST", "KUBE-NODEPORT-NON-LOCAL",
}

// servicePrefixes begin the names of chains that serve one Service port.
var servicePrefixes = [...]string{"KUBE-SVC-", "KUBE-SEP-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-"}

// servesOne reports whether a chain is one of them.
func servesOne(chain string) bool {
	return slices.ContainsFunc(servicePrefixes[:], func(prefix string) bool { return strings.HasPrefix(chain, prefix) })
}

func isKubeProxy(chain string) bool {
	if servesOne(chain) {
		return true
	}
	return slices.Contains(kubeNames, chain)
}

func isBuiltin(table, chain string) bool {
	switch chain {
	case "PREROUTING":
		return table != "filter" && table != "security"
	case "POSTROUTING":
		return table == "nat" || table == "mangle"
	case "INPUT":
		return table != "raw"
	case "FORWARD":
		return table != "raw" && table != "nat"
	case "OUTPUT":
		return true
	}
	return false
}

// IsKubeProxy reports whether only a kube-proxy makes a chain of this name, in
// whatever mode.
func IsKubeProxy(chain string) bool { return isKubeProxy(chain) }

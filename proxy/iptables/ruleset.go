package iptables

import (
	"bytes"
	"strings"

	"github.com/kptrace/kptrace/internal/xtables"
)

// ruleset parses the rules of some units and puts them together with the fixed
// ones.
func (p *program) ruleset(units []*unit) *xtables.Ruleset {
	base, own := p.fixedRules(), p.unitRules(units)
	rs := &xtables.Ruleset{Family: p.cfg.Family}
	for _, t := range base.Tables {
		into, mine := rs.Ensure(t.Name), own.Table(t.Name)
		for _, c := range t.Chains {
			rules := c.Rules
			if m := mine.Chain(c.Name); m != nil { // a shared one
				rules = append(m.Rules, rules...)
			}
			into.Ensure(c.Name, c.Policy).Rules = rules
		}
		if mine == nil {
			continue
		}
		for _, c := range mine.Chains {
			if into.Chain(c.Name) == nil {
				into.Ensure(c.Name, "-").Rules = c.Rules
			}
		}
	}
	return rs
}

// unitRules parses what units have in chains of their own and in shared ones.
func (p *program) unitRules(units []*unit) *xtables.Ruleset {
	var b bytes.Buffer
	all := renderAll(units)
	for _, table := range tables {
		b.WriteString("*" + table + "\n")
		write := func(chain string, rules []string) {
			for _, r := range rules {
				b.WriteString("-A " + chain + " " + r + "\n")
			}
		}
		for _, u := range all {
			for _, g := range u.shared {
				if g.table == table {
					write(g.chain, g.rules)
				}
			}
			for i := range u.chains {
				if u.chains[i].table == table {
					write(u.chains[i].name, u.chains[i].rules)
				}
			}
		}
		b.WriteString("COMMIT\n")
	}
	return p.mustParse(b.String())
}

// fixedRules parses the fixed rules once, as they stand on a node where no one
// else has rules.
func (p *program) fixedRules() *xtables.Ruleset {
	p.fixed.once.Do(func() {
		var b bytes.Buffer
		p.writeRules(&b, nil, false)
		p.fixed.parsed = p.mustParse(b.String())
	})
	return p.fixed.parsed
}

// mustParse reads rules that we have written ourselves.
func (p *program) mustParse(text string) *xtables.Ruleset {
	rs, err := xtables.Parse(p.cfg.Family, text)
	if err != nil {
		panic("proxy/iptables: our own rules do not parse: " + err.Error())
	}
	return rs
}

func (f *fixed) isShared(table, chain string) bool {
	for i := range f.shared {
		if f.shared[i].name == chain && f.shared[i].table == table {
			return true
		}
	}
	return false
}

// purpose says in one sentence what a rule is for.
func (o *outcomeOf) purpose(s *xtables.Step) string {
	r := s.Rule
	if prefix, ok := r.TargetOpt("nflog-prefix"); ok {
		if tagged := o.Index().Lookup([]byte(prefix)); tagged != nil {
			return "report: " + tagged.Purpose
		}
	}
	key, about, _ := strings.Cut(r.Comment(), " ")
	about = strings.TrimPrefix(about, "-> ")
	if r.Comment() == "" && strings.HasPrefix(r.Target, prefixEndpoint) {
		about = "the endpoint of " + r.Target // there are too many for comments
	}
	switch target := r.Target; {
	case target == "DNAT":
		to, _ := r.TargetOpt("to-destination")
		return "send it to " + to
	case target == "MASQUERADE":
		return "replace its source by the node's address"
	case target == "MARK" && s.Chain == chainMarkMasq:
		return "mark it to be masqueraded"
	case target == "MARK":
		return "take the mark off, so that it is not masqueraded twice"
	case target == chainMarkMasq:
		switch {
		case strings.HasPrefix(s.Chain, prefixEndpoint):
			return "masquerade it, for the client is the endpoint itself"
		case strings.HasPrefix(s.Chain, prefixExternal):
			return "masquerade it, for it came by an address for outside clients"
		case r.Src.Not, r.In.Not:
			return "masquerade it, for the client is no pod"
		}
		return "masquerade it, as all traffic to cluster IPs"
	case strings.HasPrefix(target, prefixEndpoint) && r.Match("recent") != nil:
		return "stay with " + about + ", where the client was sent before"
	case strings.HasPrefix(target, prefixEndpoint) && r.Match("statistic") != nil:
		return "take " + about + " by chance"
	case strings.HasPrefix(target, prefixEndpoint):
		return "take " + about + ", the last that is left"
	case strings.HasPrefix(target, prefixService) && strings.HasPrefix(s.Chain, prefixExternal):
		return "choose among all endpoints"
	case strings.HasPrefix(target, prefixLocal) && strings.HasPrefix(s.Chain, prefixExternal):
		return "choose among the endpoints on this node"
	case isServiceChain(target) && s.Chain == chainNodePorts:
		return "it is for a node port of " + key
	case isServiceChain(target) && strings.HasPrefix(s.Chain, prefixFirewall):
		return "its source is allowed to use the load balancer"
	case isServiceChain(target):
		return "it is for a " + about + " of " + key
	case target == "":
		return "no source range let it through"
	case target == "REJECT":
		return "refuse it, for " + key + " has no endpoints"
	case target == "DROP" && s.Chain == chainProxyFirewall:
		return "drop it, for its source is outside the source ranges of " + key
	case target == "DROP" && s.Chain == chainFirewall:
		return "drop it, for nobody outside may use 127.0.0.0/8"
	case target == "DROP":
		return "drop it, for " + key + " has no endpoints on this node"
	}
	return fixedPurpose(r.Target, s.Chain)
}

// fixedPurpose is the purpose of a rule that serves all.
func fixedPurpose(target, chain string) string {
	switch target {
	case chainServices:
		return "see whether it is for a Service"
	case chainReroute:
		return "see whether it is sent again because nobody answered"
	case chainNodePorts:
		return "see whether it is for a node port"
	case chainExternalServices:
		return "see whether it is for an outside address of a Service without endpoints"
	case chainForward:
		return "see whether it is forwarded service traffic"
	case chainProxyFirewall:
		return "see whether a load balancer's source ranges keep it out"
	case chainFirewall:
		return "see whether it abuses 127.0.0.0/8"
	case chainPostrouting:
		return "see whether it is to be masqueraded"
	case chainTrace:
		return "see whether it is news of a service connection"
	case "RETURN":
		if chain == chainTrace {
			return "it belongs to no service connection so far"
		}
		return "it is not to be masqueraded"
	case "ACCEPT":
		return "let service traffic pass, whatever the policy"
	}
	return ""
}

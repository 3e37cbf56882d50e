package liverules

import (
	"strings"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Purpose says in one sentence what a rule is for, empty where that is not
// known: its text then has to speak for itself.
func (p *Program) Purpose(table, chain string, r *xtables.Rule) string {
	if prefix, ok := r.TargetOpt("nflog-prefix"); ok {
		if tag, ok := proxy.ParseTag(prefix); ok {
			return "report: " + tagPurpose(tag)
		}
	}
	if KindOf(chain) != KindNone || KindOf(r.Target) != KindNone {
		return p.servicePurpose(chain, r)
	}
	if s := kubePurpose(table, chain, r); s != "" {
		return s
	}
	return foreignPurpose(table, chain, r)
}

func tagPurpose(t proxy.Tag) string {
	switch t.Kind {
	case proxy.TagPick:
		return "this endpoint was picked"
	case proxy.TagMiss:
		return "no session affinity holds for the client"
	case proxy.TagReject, proxy.TagDrop:
		return "the connection is refused"
	}
	return t.Kind.String()
}

// servicePurpose is for rules in, or to, the chains of one Service port.
func (p *Program) servicePurpose(chain string, r *xtables.Rule) string {
	key, about, _ := strings.Cut(r.Comment(), " ")
	kind, target := KindOf(chain), KindOf(r.Target)
	to := "the endpoint of " + r.Target
	if _, _, ep, ok := p.Chain(r.Target); ok && ep.IsValid() {
		to = ep.String()
	}
	switch {
	case r.Target == "DNAT":
		to, _ := r.TargetOpt("to-destination")
		return "send it to " + to
	case r.Target == chainMarkMasq && kind == KindEndpoint:
		return "masquerade it, for the client is the endpoint itself"
	case r.Target == chainMarkMasq && kind == KindExternal && r.Match("addrtype") != nil:
		return "masquerade it, for the node itself sent it"
	case r.Target == chainMarkMasq && kind == KindExternal:
		return "masquerade it, for it came by an address for outside clients"
	case r.Target == chainMarkMasq && (r.Src.Not || r.In.Not):
		return "masquerade it, because the client is outside the pod network"
	case r.Target == chainMarkMasq:
		return "masquerade it, as all traffic to cluster IPs"
	case target == KindEndpoint && r.Match("recent") != nil:
		return "stay with " + to + ", if the client was sent there before"
	case target == KindEndpoint && r.Match("statistic") != nil:
		return "take " + to + " by chance"
	case target == KindEndpoint:
		return "take " + to + ", the last that is left"
	case target == KindCluster && kind == KindExternal:
		return "choose among all endpoints"
	case target == KindLocal && kind == KindExternal:
		return "choose among the endpoints on this node"
	case kind == KindFirewall && target == KindExternal:
		return "its source is allowed to use the load balancer"
	case chain == chainNodePorts && target != KindNone:
		return "node port of " + key
	case target != KindNone && strings.Contains(about, "IP"):
		return strings.TrimSuffix(about, "\"") + " of " + key
	case target != KindNone:
		return "go on with " + r.Target
	case kind == KindFirewall && r.Target == "":
		return "no source range let it through"
	case r.Target == chainMarkDrop:
		return "mark it to be dropped"
	}
	return ""
}

// kubePurpose is for the rules of kube-proxy and kubelet that serve all.
func kubePurpose(table, chain string, r *xtables.Rule) string {
	key, about, _ := strings.Cut(r.Comment(), " ")
	kube := strings.HasPrefix(chain, "KUBE-")
	switch {
	case r.Target == "MASQUERADE" && kube:
		return "replace its source by the node's address"
	case r.Target == "MARK" && chain == chainMarkMasq:
		return "mark it to be masqueraded"
	case r.Target == "MARK" && chain == chainPostrouting:
		return "take the mark off, so that it is not masqueraded twice"
	case r.Target == "RETURN" && chain == chainTrace:
		return "it belongs to no service connection so far"
	case r.Target == "RETURN" && chain == chainPostrouting:
		return "it is not to be masqueraded"
	case r.Target == "REJECT" && strings.HasPrefix(about, "has no"):
		return "refuse it, for " + key + " " + about
	case r.Target == "DROP" && strings.HasPrefix(about, "has no"):
		return "drop it, for " + key + " has no endpoints on this node"
	case r.Target == "DROP" && chain == chainProxyFirewall:
		return "drop it, for its source is outside the source ranges of " + key
	case r.Target == "DROP" && chain == chainFirewall && strings.Contains(r.Comment(), "localnet"):
		return "drop it, for nobody outside may use 127.0.0.0/8"
	case r.Target == "DROP" && chain == chainForward:
		return "drop it, for connection tracking calls it invalid"
	case r.Target == "ACCEPT" && chain == chainForward:
		return "let service traffic pass, whatever the policy"
	case r.Target == "ACCEPT" && kube && strings.Contains(about, "health check"):
		return "let load balancers ask for the health of " + key
	}
	switch r.Target {
	case chainServices:
		if table == "filter" {
			return "see whether it is for a Service without endpoints"
		}
		return "see whether it is for a Service"
	case chainNodePorts:
		if table == "filter" {
			return "see whether it asks for a Service's health"
		}
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
	case chainMarkMasq:
		return "mark it to be masqueraded"
	case chainTrace:
		return "see whether it is news of a service connection"
	}
	return ""
}

// foreignPurpose says whose a rule is and what it does in a few words.
func foreignPurpose(table, chain string, r *xtables.Rule) string {
	owner := Owner(table, chain, r)
	if _, ok := r.TargetOpt("notrack"); ok || r.Target == "NOTRACK" {
		if owner == "" {
			owner = table
		}
		return "not tracked: " + owner + " says NOTRACK"
	}
	if owner == "" {
		return ""
	}
	switch r.Target {
	case "ACCEPT":
		return owner + " accepts it"
	case "DROP":
		return owner + " drops it"
	case "REJECT":
		return owner + " refuses it"
	case "MASQUERADE":
		return owner + " replaces its source by the node's address"
	case "SNAT", "DNAT", "REDIRECT", "NETMAP":
		return owner + " translates it"
	case "RETURN":
		return owner + " has nothing against it here"
	case "MARK", "CONNMARK":
		return owner + " marks it"
	case "", "NFLOG", "LOG":
		return owner + " counts or logs it"
	}
	return "ask " + owner
}

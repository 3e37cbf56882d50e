package ipvs

import (
	"fmt"
	"strconv"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// The chains, by kube-proxy's names where it has them.
const (
	chainServices     = "KUBE-SERVICES"
	chainPostrouting  = "KUBE-POSTROUTING"
	chainNodePort     = "KUBE-NODE-PORT"
	chainLoadBalancer = "KUBE-LOAD-BALANCER"
	chainMarkMasq     = "KUBE-MARK-MASQ"
	chainForward      = "KUBE-FORWARD"
	chainFirewall     = "KUBE-PROXY-FIREWALL"
	chainSourceRanges = "KUBE-SOURCE-RANGES-FIREWALL"
	chainFilter       = "KUBE-IPVS-FILTER"
	chainOutFilter    = "KUBE-IPVS-OUT-FILTER"
)

// The ids of tags. Rules do not grow with Services, so a tag says what happened
// and the packet's addresses say to whom.
const (
	idNoEndpoints  = "noep"
	idNoLocal      = "nolocal"
	idSourceRanges = "range"
)

// nflogSize is what of each packet the NFLOG rules copy; see proxy/iptables.
const nflogSize = 64

// rulesWriter makes the rules of one family.
type rulesWriter struct {
	*renderer
	layout xtables.Layout
	tagged []*proxy.Rule
}

func comment(s string) string { return ` -m comment --comment "` + s + `"` }

// in is the match for a set.
func (w *rulesWriter) in(s set, dirs string) string {
	return "-m set --match-set " + s.name(w.ip6) + " " + dirs
}

func (w *rulesWriter) chain(table, name string, rules ...string) {
	kept := rules[:0]
	for _, r := range rules {
		if r != "" {
			kept = append(kept, r)
		}
	}
	w.layout.Chains = append(w.layout.Chains, xtables.LayoutChain{Table: table, Name: name, Rules: kept})
}

func (w *rulesWriter) jump(table, to, match, about string, from ...string) {
	if match != "" {
		match += " "
	}
	for _, chain := range from {
		w.layout.Jumps = append(w.layout.Jumps, xtables.LayoutJump{Table: table, Chain: chain, Rule: match + comment(about)[1:] + " -j " + to})
	}
}

// log writes a tagged rule, none where nobody traces.
func (w *rulesWriter) log(match string, tag proxy.Tag, size int, rule proxy.Rule) string {
	if !w.cfg.Trace {
		return ""
	}
	if match != "" {
		match += " "
	}
	rule.Tag = tag
	w.tagged = append(w.tagged, &rule)
	return match + `-j NFLOG --nflog-prefix "` + tag.String() + `" --nflog-group ` + strconv.Itoa(int(w.cfg.NFLogGroup)) +
		" --nflog-size " + strconv.Itoa(size)
}

// rules writes all of a family's.
func (r *renderer) rules() (xtables.Layout, []*proxy.Rule) {
	family := xtables.IPv4
	if r.ip6 {
		family = xtables.IPv6
	}
	w := &rulesWriter{renderer: r, layout: xtables.Layout{Family: family}}
	w.nat()
	w.filter()
	w.mangle()
	return w.layout, w.tagged
}

// nat follows kube-proxy 1.36, but that what is known to be a Service's leaves
// before node ports are asked: else a port of a Service that is also the number of
// somebody's node port would be masqueraded.
func (w *rulesWriter) nat() {
	mark := fmt.Sprintf("0x%x", w.cfg.MasqueradeMark)
	loopback, masq := "127.0.0.0/8", " -j "+chainMarkMasq
	if w.ip6 {
		loopback = "::1/128"
	}
	clusterIP := w.in(setClusterIP, "dst,dst") + comment("Kubernetes service cluster ip + port for masquerade purpose")
	switch d := w.detector; {
	case w.cfg.MasqueradeAll:
	case d.CIDR.IsValid():
		clusterIP = "! -s " + d.CIDR.String() + " " + clusterIP
	case d.Interface != "":
		clusterIP = "! -i " + d.Interface + " " + clusterIP
	default: // what the node itself sends has the cluster IP for a source
		clusterIP = w.in(setClusterIP, "src,dst") + comment("Kubernetes service cluster ip + port for masquerade purpose")
	}
	fromNode := "-m addrtype --src-type LOCAL "
	w.chain("nat", chainServices,
		"-s "+loopback+" -j RETURN",
		w.in(setLoadBalancer, "dst,dst")+comment("Kubernetes service lb portal")+" -j "+chainLoadBalancer,
		clusterIP+masq,
		w.in(setExternalIP, "dst,dst")+comment("Kubernetes service external ip + port for masquerade and filter purpose")+masq,
		fromNode+w.in(setExternalIPLocal, "dst,dst")+comment("Kubernetes service external ip, from the node itself")+masq,
		w.in(setClusterIP, "dst,dst")+" -j ACCEPT",
		w.in(setLoadBalancer, "dst,dst")+" -j ACCEPT",
		w.in(setExternalIP, "dst,dst")+" -j ACCEPT",
		w.in(setExternalIPLocal, "dst,dst")+" -j ACCEPT",
		"-m addrtype --dst-type LOCAL -j "+chainNodePort)
	w.chain("nat", chainLoadBalancer,
		fromNode+w.in(setLoadBalancerLocal, "dst,dst")+comment("Kubernetes service load balancer with externalTrafficPolicy=local, from the node itself")+masq,
		w.in(setLoadBalancerLocal, "dst,dst")+comment("Kubernetes service load balancer ip + port with externalTrafficPolicy=local")+" -j RETURN",
		masq[1:])
	w.chain("nat", chainNodePort,
		"-p tcp "+w.in(setNodePortLocalTCP, "dst")+comment("Kubernetes nodeport TCP port with externalTrafficPolicy=local")+" -j RETURN",
		"-p tcp "+w.in(setNodePortTCP, "dst")+comment("Kubernetes nodeport TCP port for masquerade purpose")+masq,
		"-p udp "+w.in(setNodePortLocalUDP, "dst")+comment("Kubernetes nodeport UDP port with externalTrafficPolicy=local")+" -j RETURN",
		"-p udp "+w.in(setNodePortUDP, "dst")+comment("Kubernetes nodeport UDP port for masquerade purpose")+masq,
		"-p sctp "+w.in(setNodePortLocalSCTP, "dst,dst")+comment("Kubernetes nodeport SCTP port with externalTrafficPolicy=local")+" -j RETURN",
		"-p sctp "+w.in(setNodePortSCTP, "dst,dst")+comment("Kubernetes nodeport SCTP port for masquerade purpose")+masq)
	w.chain("nat", chainMarkMasq, "-j MARK --set-xmark "+mark+"/"+mark)
	w.chain("nat", chainPostrouting,
		w.in(setLoopBack, "dst,dst,src")+comment("Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose")+" -j MASQUERADE",
		"-m mark ! --mark "+mark+"/"+mark+" -j RETURN",
		"-j MARK --set-xmark "+mark+"/0x0",
		comment("kubernetes service traffic requiring SNAT")[1:]+" -j MASQUERADE --random-fully")
	w.jump("nat", chainServices, "", "kubernetes service portals", "OUTPUT", "PREROUTING")
	w.jump("nat", chainPostrouting, "", "kubernetes postrouting rules", "POSTROUTING")
}

func (w *rulesWriter) filter() {
	mark := fmt.Sprintf("0x%x", w.cfg.MasqueradeMark)
	reject := "-j REJECT --reject-with icmp-port-unreachable"
	if w.ip6 {
		reject = "-j REJECT --reject-with icmp6-port-unreachable"
	}
	w.chain("filter", chainForward,
		"-m mark --mark "+mark+"/"+mark+comment("kubernetes forwarding rules")+" -j ACCEPT",
		"-m conntrack --ctstate RELATED,ESTABLISHED"+comment("kubernetes forwarding conntrack rule")+" -j ACCEPT")
	w.chain("filter", chainNodePort,
		"-p tcp "+w.in(setHealthCheck, "dst")+comment("Kubernetes health check node port")+" -j ACCEPT")
	w.chain("filter", chainFirewall,
		w.in(setLoadBalancerFW, "dst,dst")+comment("Kubernetes service load balancer ip + port for load balancer with sourceRange")+" -j "+chainSourceRanges)
	w.sourceRanges("filter")
	refusal := func(s set, kind proxy.TagKind, id, reason, purpose, about, target string) []string {
		return []string{
			w.log("-m conntrack --ctstate NEW "+w.in(s, "dst,dst"), proxy.Tag{Kind: kind, ID: id}, nflogSize,
				proxy.Rule{Table: "filter", Chain: chainFilter, Reason: reason, Purpose: purpose}),
			"-m conntrack --ctstate NEW " + w.in(s, "dst,dst") + comment(about) + " " + target,
		}
	}
	rules := refusal(setNoEndpoints, proxy.TagReject, idNoEndpoints, "no-endpoints",
		"refuse connections to a Service that has no endpoints", "the service has no endpoints", reject)
	rules = append(rules, refusal(setNoLocal, proxy.TagDrop, idNoLocal, "no-local-endpoints",
		"drop connections to a Service that has no endpoints on this node", "the service has no local endpoints", "-j DROP")...)
	for _, s := range []set{setLoadBalancer, setClusterIP, setExternalIP, setExternalIPLocal} {
		rules = append(rules, w.in(s, "dst,dst")+" -j RETURN")
	}
	rules = append(rules, "-p tcp "+w.in(setHealthCheck, "dst")+" -j RETURN",
		"-m conntrack --ctstate NEW "+w.in(setIPs, "dst")+comment("no port of a service, and the node's own are not to be reached by its addresses")+" "+reject)
	w.chain("filter", chainFilter, rules...)
	w.jump("filter", chainForward, "", "kubernetes forwarding rules", "FORWARD")
	w.jump("filter", chainNodePort, "", "kubernetes health check rules", "INPUT")
	w.jump("filter", chainFirewall, "", "kube-proxy firewall rules", "INPUT", "FORWARD")
	w.jump("filter", chainFilter, "", "kubernetes ipvs access filter", "INPUT")
}

// sourceRanges writes the chain that lets the source ranges of load balancers
// pass. It is in filter for what comes in, and in mangle for what the node sends:
// IPVS takes that before filter sees it.
func (w *rulesWriter) sourceRanges(table string) {
	w.chain(table, chainSourceRanges,
		w.in(setSourceCIDR, "dst,dst,src")+comment("Kubernetes service load balancer ip + port + source cidr for packet filter")+" -j RETURN",
		w.in(setSourceIP, "dst,dst,src")+comment("Kubernetes service load balancer ip + port + source IP for packet filter purpose")+" -j RETURN",
		w.log("", proxy.Tag{Kind: proxy.TagDrop, ID: idSourceRanges}, nflogSize, proxy.Rule{Table: table, Chain: chainSourceRanges,
			Reason: "source-range", Purpose: "drop connections to a LoadBalancer from outside its source ranges"}),
		"-j DROP")
}

// mangle has the filter for what the node sends, and our own chains for the life
// of connections.
func (w *rulesWriter) mangle() {
	w.sourceRanges("mangle")
	w.chain("mangle", chainOutFilter, w.in(setLoadBalancerFW, "dst,dst")+" -j "+chainSourceRanges)
	w.jump("mangle", chainOutFilter, "-m conntrack --ctstate NEW", "kubernetes ipvs access filter", "OUTPUT")
	if !w.cfg.Trace {
		return
	}
	r := proxy.Reports{
		Group: w.cfg.NFLogGroup, Virtual: setVirtual.name(w.ip6), Real: setReal.name(w.ip6),
		Picked: "-m ipvs --ipvs", PickID: proxy.IDScheduled,
	}
	w.tagged = append(w.tagged, r.AddTo(&w.layout)...)
}

// isOurs reports whether a chain is one of ours, or one that the iptables mode
// of a kube-proxy would leave behind.
func isOurs(table, chain string) bool {
	switch chain {
	case chainServices:
		return table == "nat" || table == "filter"
	case chainPostrouting, chainLoadBalancer, chainMarkMasq:
		return table == "nat"
	case chainNodePort:
		return table == "nat" || table == "filter"
	case chainForward, chainFirewall, chainFilter:
		return table == "filter"
	case chainSourceRanges:
		return table == "filter" || table == "mangle"
	case chainOutFilter:
		return table == "mangle" || table == "filter"
	case proxy.ChainTrace, proxy.ChainLife, proxy.ChainPick:
		return table == "mangle"
	}
	return false
}

package iptables

import (
	"slices"
	"strconv"
	"sync"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// jumpRule leads from a built-in chain to one of ours.
type jumpRule struct {
	table, chain, rule string
	// to is the chain it leads to.
	to string
}

// sharedChain is a chain in which every Service may have groups.
type sharedChain struct {
	table, name string
	// last are the rules that stand behind all groups.
	last []string
}

// fixed is what does not depend on Services. It does not change.
type fixed struct {
	// own are the chains that are ours as a whole.
	own    []chain
	shared []sharedChain
	// foreign are rules of ours in chains that others write to as well; they
	// are added where absent, at the end, and nothing else is touched.
	foreign []chain
	// jumps are put at the head of their chains in this order, so the last
	// one ends up first.
	jumps  []jumpRule
	tagged []*proxy.Rule

	once   sync.Once // guards parsed
	parsed *xtables.Ruleset
}

// same reports whether two renderings of the same Config are equal; only the
// node's addresses can make them differ.
func (f *fixed) same(o *fixed) bool {
	return slices.EqualFunc(f.shared, o.shared, func(a, b sharedChain) bool { return slices.Equal(a.last, b.last) })
}

// renderer renders for one Config and Node. Units keep it; any goroutine may
// use it.
type renderer struct {
	cfg  *Config
	node proxy.Node
	// sctp says that there are Services of SCTP, whose rules take a kernel that
	// has the match.
	sctp  bool
	local detector
	// large leaves out the comments of endpoints; see largeEndpoints.
	large bool

	mu    sync.Mutex // protects what follows
	probs []string   // by number of endpoints left
}

// largeEndpoints is the number of endpoints beyond which their rules have no
// comments, as kube-proxy's largeClusterEndpointsThreshold.
const largeEndpoints = 1000

// aboutEndpoint is the comment of an endpoint's rule.
func (r *renderer) aboutEndpoint(s string) string {
	if r.large {
		return ""
	}
	return comment(s)
}

func (r *renderer) probability(n int) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.probs) <= n {
		r.probs = append(r.probs, "")
	}
	if r.probs[n] == "" {
		r.probs[n] = probability(n)
	}
	return r.probs[n]
}

// fixed writes what stays. Order and comments are those of kube-proxy 1.36.
func (r *renderer) fixed() *fixed {
	mark := hex(r.cfg.MasqueradeMark)
	bits := mark + "/" + mark
	f := &fixed{
		own: []chain{
			{"nat", chainPostrouting, []string{
				"-m mark ! --mark " + bits + " -j RETURN",
				"-j MARK --set-xmark " + mark + "/0x0",
				line(comment("kubernetes service traffic requiring SNAT"), "-j MASQUERADE --random-fully"),
			}},
			{"nat", chainMarkMasq, []string{"-j MARK --set-xmark " + bits}},
			{"filter", chainForward, r.forward(bits)},
			{"mangle", chainCanary, nil},
			{"filter", chainCanary, nil},
			{"nat", chainCanary, nil},
		},
		shared: []sharedChain{
			{"filter", chainServices, nil},
			{"filter", chainExternalServices, nil},
			{"filter", chainNodePorts, nil},
			{"filter", chainProxyFirewall, nil},
			{"nat", chainServices, r.toNodePorts()},
			{"nat", chainNodePorts, nil},
		},
	}
	fresh := "-m conntrack --ctstate NEW"
	add := func(table, to, match, about string, chains ...string) {
		for _, from := range chains {
			rule := line(match, comment(about), jump(to))
			if about == "" {
				rule = jump(to)
			}
			f.jumps = append(f.jumps, jumpRule{table, from, rule, to})
		}
	}
	add("filter", chainExternalServices, fresh, "kubernetes externally-visible service portals", "INPUT", "FORWARD")
	add("filter", chainNodePorts, "", "kubernetes health check service ports", "INPUT")
	add("filter", chainServices, fresh, "kubernetes service portals", "FORWARD", "OUTPUT")
	add("filter", chainForward, "", "kubernetes forwarding rules", "FORWARD")
	add("filter", chainProxyFirewall, fresh, "kubernetes load balancer firewall", "INPUT", "OUTPUT", "FORWARD")
	add("nat", chainServices, "", "kubernetes service portals", "OUTPUT", "PREROUTING")
	add("nat", chainPostrouting, "", "kubernetes postrouting rules", "POSTROUTING")
	if r.cfg.Reroute {
		f.shared = append(f.shared, sharedChain{"nat", chainReroute, nil})
		add("nat", chainReroute, "-p tcp", aboutReroute, "OUTPUT", "PREROUTING")
	}
	f.foreign = []chain{{"filter", chainFirewall, nil}}
	if r.localhost() {
		f.foreign[0].rules = []string{localnetRule}
	}
	add("filter", chainFirewall, "", "", "INPUT", "OUTPUT")
	if r.cfg.Trace {
		r.trace(f)
	}
	return f
}

// knownJumps are all jump rules that any Config makes.
func knownJumps(f xtables.Family) []jumpRule {
	r := &renderer{cfg: &Config{Family: f, LocalhostNodePorts: true, Trace: true, RequestGroup: 1, Reroute: true}}
	return r.fixed().jumps
}

// localnetRule guards the hole that route_localnet makes. The kubelet writes
// the same rule.
var localnetRule = line("! -s 127.0.0.0/8 -d 127.0.0.0/8", comment("block incoming localnet connections"),
	"-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP")

// localhost reports whether node ports are served on 127.0.0.0/8.
func (r *renderer) localhost() bool {
	if !r.cfg.LocalhostNodePorts || r.cfg.Family != xtables.IPv4 {
		return false
	}
	return r.cfg.nodePorts().Loopback(&r.node)
}

func (r *renderer) forward(bits string) []string {
	var rules []string
	if !r.cfg.KeepInvalid {
		count := ""
		if r.cfg.Counters {
			count = "-m nfacct --nfacct-name " + CounterInvalid
		}
		rules = append(rules, line("-m conntrack --ctstate INVALID", count, "-j DROP"))
	}
	return append(rules,
		line(comment("kubernetes forwarding rules"), "-m mark --mark "+bits+" -j ACCEPT"),
		line(comment("kubernetes forwarding conntrack rule"), "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"))
}

// toNodePorts are the rules that must be last in nat KUBE-SERVICES.
func (r *renderer) toNodePorts() []string {
	about := comment("kubernetes service nodeports; NOTE: this must be the last rule in this chain")
	if len(r.nodePortRanges()) == 0 {
		not := ""
		switch {
		case r.cfg.Family == xtables.IPv6:
			not = "! -d ::1/128"
		case !r.localhost():
			not = "! -d 127.0.0.0/8"
		}
		return []string{line(not, about, "-m addrtype --dst-type LOCAL", jump(chainNodePorts))}
	}
	var rules []string
	for _, ip := range r.nodePortAddrs() {
		rules = append(rules, line(to(host(ip)), about, jump(chainNodePorts)))
	}
	return rules
}

// trace adds our chain for the life of connections. Data packets meet one tcp
// match in the built-in chain and go on. The comment comes last: it is a match
// like any other, and every packet that gets so far pays for it.
func (r *renderer) trace(f *fixed) {
	icmp := "icmp"
	if r.cfg.Family == xtables.IPv6 {
		icmp = "ipv6-icmp"
	}
	about := comment("kptrace: life of service connections")
	for _, from := range []string{"PREROUTING", "OUTPUT"} {
		in := "" // what comes in by lo went out by OUTPUT
		if from == "PREROUTING" {
			in = "! -i lo"
		}
		if r.sctp {
			f.jumps = append(f.jumps, jumpRule{"mangle", from,
				line(in, "-p sctp", "-m sctp --chunk-types any INIT_ACK,ABORT,SHUTDOWN", about, jump(chainTrace)), chainTrace})
		}
		for _, rule := range []string{
			line(in, "-p udp", "-m conntrack --ctstate DNAT --ctdir REPLY",
				"-m connbytes --connbytes 1:1 --connbytes-mode packets --connbytes-dir reply", about, jump(chainTrace)),
			line(in, "-p "+icmp, "-m conntrack --ctstate RELATED", about, jump(chainTrace)),
			line(in, "-p tcp", "-m tcp ! --tcp-flags FIN,SYN,RST NONE", about, jump(chainTrace)),
		} {
			f.jumps = append(f.jumps, jumpRule{"mangle", from, rule, chainTrace})
		}
	}
	if r.cfg.RequestGroup != 0 {
		r.requests(f)
	}
	var rules []string
	if !r.cfg.KeepInvalid { // KUBE-FORWARD drops them
		tag := proxy.Tag{Kind: proxy.TagInvalid}
		f.jumps = append(f.jumps, jumpRule{"mangle", "FORWARD", line("-p tcp", "-m conntrack --ctstate INVALID", about, jump(chainTrace)), chainTrace})
		rules = append(rules, line(proxy.InvalidSegment, r.nflog(tag, nflogSize)))
		f.tagged = append(f.tagged, &proxy.Rule{Tag: tag, Table: "mangle", Chain: chainTrace, Purpose: proxy.InvalidPurpose})
	}
	rules = append(rules, "-m conntrack ! --ctstate DNAT -j RETURN")
	for _, life := range []struct {
		kind           proxy.TagKind
		match, purpose string
		size           int
	}{
		{proxy.TagSynAck, "-p tcp -m tcp --tcp-flags SYN,ACK SYN,ACK", "report the answer to a SYN", nflogSize},
		{proxy.TagFin, "-p tcp -m tcp --tcp-flags FIN FIN", "report the end of one direction", nflogSize},
		{proxy.TagRst, "-p tcp -m tcp --tcp-flags RST RST", "report a reset", nflogSize},
		{proxy.TagSyn, "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", "report a SYN sent again", nflogSize},
		{proxy.TagICMP, "-p " + icmp, "report an ICMP error about a service connection", nflogSizeICMP},
		{proxy.TagReply, "-p udp", "report the first answer of a UDP flow", nflogSize},
	} {
		tag := proxy.Tag{Kind: life.kind}
		rules = append(rules, line(life.match, r.nflog(tag, life.size)))
		f.tagged = append(f.tagged, &proxy.Rule{Tag: tag, Table: "mangle", Chain: chainTrace, Purpose: life.purpose})
	}
	if r.cfg.RequestGroup != 0 {
		tag := proxy.Tag{Kind: proxy.TagRequest}
		rules = append(rules, line("-p tcp -m tcp --tcp-flags FIN,SYN,RST NONE", nflogTo(tag, r.cfg.RequestGroup, nflogSizeHeader)))
		f.tagged = append(f.tagged, &proxy.Rule{Tag: tag, Table: "mangle", Chain: chainTrace, Purpose: "report a request that names the span which sent it"})
	}
	if r.sctp {
		// The tags are those of TCP: they mean the same.
		for _, life := range []struct {
			kind  proxy.TagKind
			chunk string
		}{{proxy.TagSynAck, "INIT_ACK"}, {proxy.TagFin, "SHUTDOWN"}, {proxy.TagRst, "ABORT"}} {
			rules = append(rules, line("-p sctp -m sctp --chunk-types any "+life.chunk, r.nflog(proxy.Tag{Kind: life.kind}, nflogSize)))
		}
	}
	f.own = append(f.own, chain{"mangle", chainTrace, rules})
}

// requests adds the search for requests that name a span. The cheap matches come
// first: only data that a client sends to a Service is searched, and its first
// bytes only.
func (r *renderer) requests(f *fixed) {
	for _, from := range []string{"PREROUTING", "OUTPUT"} {
		in := ""
		if from == "PREROUTING" {
			in = "! -i lo"
		}
		f.jumps = append(f.jumps, jumpRule{"mangle", from, line(in, "-p tcp", "-m tcp --tcp-flags FIN,SYN,RST NONE",
			"-m length --length 100:65535", "-m conntrack --ctstate DNAT --ctdir ORIGINAL",
			"-m string --string \""+requestText+"\" --algo bm --from "+strconv.Itoa(requestFrom)+" --to "+strconv.Itoa(requestTo)+" --icase",
			comment("kptrace: requests that name a span"), jump(chainTrace)), chainTrace})
	}
}

func hasSCTP(s *proxy.Snapshot) bool {
	return slices.ContainsFunc(s.Services, func(svc proxy.Service) bool { return svc.Name.Proto == conntrack.SCTP })
}

// Render says what should be in the kernel for the Services of the Config's
// family. Units of Services that did not change are taken over from the last
// call; the text of rules is made when it is needed.
func (b *Backend) Render(s *proxy.Snapshot, o proxy.Overlay) proxy.Program {
	b.render.Lock()
	defer b.render.Unlock()
	r := &renderer{cfg: &b.cfg, node: s.Node, local: b.cfg.detector(&s.Node), large: b.isLarge(s), sctp: hasSCTP(s)}
	p := &program{cfg: &b.cfg, node: s.Node, fixed: r.fixed()}
	same := sameNode(b.memoNode, s.Node) && b.memoLarge == r.large
	if same && len(o.Out) == 0 && b.patch(r, p, s.Services) {
		b.last = rendering{s.Services, p}
		return p
	}
	check := &proxy.Checker{IP6: b.cfg.Family == xtables.IPv6, Claims: make(map[proxy.Claim]proxy.Owner, len(s.Services))}
	memo := make(map[proxy.PortName]*unit, len(s.Services))
	p.units = make([]*unit, 0, len(s.Services))
	for i := range s.Services {
		svc, ok := check.Service(&s.Services[i])
		if !ok {
			continue
		}
		u := b.memo[svc.Name]
		eps := s.Services[i].Endpoints
		var sel proxy.Select
		if u != nil && same && len(o.Out) == 0 && u.selected(eps) {
			sel = u.sel
		} else {
			sel = svc.Select(s.Node, o)
		}
		if u == nil || !same || !u.same(&svc, &sel) {
			u = r.unit(&svc, sel)
		}
		u.from = eps
		if len(o.Out) > 0 {
			u.from = nil
		}
		memo[svc.Name] = u
		p.units = append(p.units, u)
	}
	if b.walks == nil || !same {
		b.walks = proxy.NewWalkCache[walkKey]()
	}
	p.walks = b.walks
	b.memo, b.memoNode, b.memoLarge = memo, s.Node, r.large
	p.claims, p.problems = check.Claims, check.Problems
	b.last = rendering{}
	if len(o.Out) == 0 {
		b.last = rendering{s.Services, p}
	}
	return p
}

// isLarge reports whether the family has so many endpoints that comments on each
// would cost too much.
func (b *Backend) isLarge(s *proxy.Snapshot) bool {
	n := 0
	for i := range s.Services {
		if b.cfg.ours(s.Services[i].ClusterIP) {
			n += len(s.Services[i].Endpoints)
		}
	}
	return n > largeEndpoints
}

// sameNode reports whether rules that name the node's addresses stay.
func sameNode(a, b proxy.Node) bool {
	return a.Name == b.Name && a.Zone == b.Zone && slices.Equal(a.Addrs, b.Addrs) && slices.Equal(a.PodCIDRs, b.PodCIDRs)
}

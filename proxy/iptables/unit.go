package iptables

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/kptrace/kptrace/proxy"
)

// chain is one chain that is ours as a whole.
type chain struct {
	table, name string
	// rules are written as in text.go.
	rules []string
}

// group is a run of rules that one Service port has in a chain shared by all.
// They stay in this order; groups among themselves have none.
type group struct {
	table, chain string
	rules        []string
}

// unit is one Service port's share of the rules. It is immutable and lives
// from one Program to the next while the Service stays as it is. Rules are
// made whenever they are asked for: the text of 5,000 Services of 10 endpoints
// takes 30 MB, and is seldom needed again.
type unit struct {
	svc  proxy.Service // Endpoints are left out: see sel
	sel  proxy.Select
	hash string
	by   *renderer

	// counted are the numbers of rules in nat and filter once they were made.
	counted atomic.Pointer[[2]int]
	tagOnce sync.Once // guards tags
	tags    []*proxy.Rule

	// from is what sel was chosen from while nothing was out, nil if unknown.
	// It is Render's alone.
	from []proxy.Endpoint
}

// rendered is a unit's rules.
type rendered struct {
	chains []chain // of nat, those of endpoints first
	shared []group
	tagged []*proxy.Rule
}

// detail says how much of a unit is made, each what stands before it and more.
type detail uint8

const (
	dispatch detail = iota // shared
	named                  // chains without their rules
	whole
	tagged
)

// selected reports whether sel is what a Select of eps gives. Snapshots do not
// change, so endpoints in the same place are the same.
func (u *unit) selected(eps []proxy.Endpoint) bool {
	return len(u.from) > 0 && len(u.from) == len(eps) && &u.from[0] == &eps[0]
}

// same reports whether a unit made of svc and sel would be the same.
func (u *unit) same(svc *proxy.Service, sel *proxy.Select) bool {
	a, b := &u.svc, svc
	return a.Name == b.Name && a.ClusterIP == b.ClusterIP && a.Port == b.Port && a.NodePort == b.NodePort &&
		a.Affinity == b.Affinity && a.InternalLocal == b.InternalLocal && a.ExternalLocal == b.ExternalLocal &&
		a.HealthCheckNodePort == b.HealthCheckNodePort &&
		slices.Equal(a.ExternalIPs, b.ExternalIPs) && slices.Equal(a.LoadBalancerIPs, b.LoadBalancerIPs) &&
		slices.Equal(a.SourceRanges, b.SourceRanges) &&
		u.sel.Policy == sel.Policy && u.sel.LocalPolicy == sel.LocalPolicy &&
		u.sel.Excluded == sel.Excluded && u.sel.LocalExcluded == sel.LocalExcluded &&
		slices.EqualFunc(u.sel.Cluster, sel.Cluster, sameAddr) && slices.EqualFunc(u.sel.Local, sel.Local, sameAddr)
}

func sameAddr(a, b proxy.Endpoint) bool { return a.Addr == b.Addr }

// unitWriter makes the rules of one unit.
type unitWriter struct {
	*renderer
	*unit
	rendered
	detail     detail
	key, proto string
}

// unit is of one Service port. It has been checked.
func (r *renderer) unit(svc *proxy.Service, sel proxy.Select) *unit {
	u := &unit{svc: *svc, sel: sel, hash: serviceHash(svc.Name), by: r}
	u.svc.Endpoints = nil
	return u
}

func (u *unit) writer(d detail) *unitWriter {
	return &unitWriter{renderer: u.by, unit: u, detail: d, key: u.svc.Name.String(), proto: u.svc.Name.Proto.String()}
}

// render makes the rules.
func (u *unit) render(d detail) *rendered {
	w := u.writer(d)
	if d >= named {
		w.endpoints(u.reached())
	}
	w.write()
	if d >= whole {
		u.note(&w.rendered)
	}
	return &w.rendered
}

// note counts the rules of r, which are all of u.
func (u *unit) note(r *rendered) {
	if u.counted.Load() != nil {
		return
	}
	n := [2]int{}
	for i := range r.chains {
		n[0] += len(r.chains[i].rules)
	}
	for _, g := range r.shared {
		if g.table == "nat" {
			n[0] += len(g.rules)
		} else {
			n[1] += len(g.rules)
		}
	}
	u.counted.Store(&n)
}

// count returns the numbers of rules in nat and filter.
func (u *unit) count() (nat, filter int) {
	if u.counted.Load() == nil {
		u.render(whole)
	}
	n := u.counted.Load()
	return n[0], n[1]
}

// tagged are the rules that report.
func (u *unit) tagged() []*proxy.Rule {
	if u.by.cfg.Trace {
		u.tagOnce.Do(func() { u.tags = u.render(tagged).tagged })
	}
	return u.tags
}

// write follows the order of syncProxyRules in kube-proxy 1.36.
func (w *unitWriter) write() {
	svc, sel := &w.svc, &w.sel
	has := len(sel.Cluster) > 0
	hasInternal, hasExternal := has, has
	internal, external := prefixService+w.hash, prefixService+w.hash
	if svc.InternalLocal {
		internal, hasInternal = prefixLocal+w.hash, len(sel.Local) > 0
	}
	if svc.ExternalLocal {
		external, hasExternal = prefixLocal+w.hash, len(sel.Local) > 0
	}

	ext, fw := prefixExternal+w.hash, prefixFirewall+w.hash
	usesFirewall := has && len(svc.LoadBalancerIPs) > 0 && len(svc.SourceRanges) > 0
	lb := ext
	if usesFirewall {
		lb = fw
	}

	match := w.match(svc.ClusterIP, svc.Port)
	if hasInternal {
		w.share("nat", chainServices, match(" cluster IP", jump(internal)))
	} else {
		w.refuse(chainServices, proxy.ViaClusterIP, has, match)
	}
	for _, ip := range svc.ExternalIPs {
		match := w.match(ip, svc.Port)
		if has {
			w.share("nat", chainServices, match(" external IP", jump(ext)))
		}
		if !hasExternal {
			w.refuse(chainExternalServices, proxy.ViaExternalIP, has, match)
		}
	}
	for _, ip := range svc.LoadBalancerIPs {
		match := w.match(ip, svc.Port)
		if has {
			w.share("nat", chainServices, match(" loadbalancer IP", jump(lb)))
		}
		if usesFirewall {
			w.refuseRange(fw, match)
		}
		if !hasExternal {
			w.refuse(chainExternalServices, proxy.ViaLoadBalancer, has, match)
		}
	}
	if svc.NodePort != 0 {
		if has {
			var rules []string
			if w.cfg.Counters && w.localhost() {
				rules = append(rules, line("-d 127.0.0.0/8 -p "+w.proto, comment(w.key), dport(w.proto, svc.NodePort),
					"-m nfacct --nfacct-name "+CounterLocalhost, jump(ext)))
			}
			w.share("nat", chainNodePorts, append(rules, w.nodePort("")("", jump(ext)))...)
		}
		if !hasExternal {
			w.refuse(chainExternalServices, proxy.ViaNodePort, has, w.nodePort("-m addrtype --dst-type LOCAL"))
		}
	}
	if svc.HealthCheckNodePort != 0 {
		w.share("filter", chainNodePorts, line("-p tcp", comment(w.key+" health check node port"),
			dport("tcp", svc.HealthCheckNodePort), "-j ACCEPT"))
	}

	if w.detail < named {
		return
	}
	if has && svc.UsesCluster() {
		w.balance(prefixService+w.hash, internal, sel.Cluster, proxy.TagMiss, w.hash)
	}
	if len(sel.Local) > 0 && svc.UsesLocal() {
		w.balance(prefixLocal+w.hash, internal, sel.Local, proxy.TagMiss, w.hash+"L")
	}
	if has && svc.ExternallyReachable() {
		w.external(ext, external, hasExternal)
	}
	if usesFirewall {
		w.firewall(fw, ext)
	}
}

// matcher writes a rule that matches one of the Service's addresses; about is
// what its comment says behind the Service's name.
type matcher func(about, target string) string

func (w *unitWriter) match(ip netip.Addr, port uint16) matcher {
	return func(about, target string) string {
		return line(to(host(ip)), "-p "+w.proto, comment(w.key+about), dport(w.proto, port), target)
	}
}

func (w *unitWriter) nodePort(local string) matcher {
	return func(about, target string) string {
		return line("-p "+w.proto, comment(w.key+about), local, dport(w.proto, w.svc.NodePort), target)
	}
}

// share adds a group to a chain that all Services share.
func (w *unitWriter) share(table, chain string, rules ...string) {
	w.shared = append(w.shared, group{table, chain, rules})
}

// The letters that tell the tags of one Service's refusals apart.
func viaLetter(v proxy.Via) string {
	switch v {
	case proxy.ViaNodePort:
		return "n"
	case proxy.ViaExternalIP:
		return "e"
	case proxy.ViaLoadBalancer:
		return "l"
	}
	return "c"
}

// refuse adds the filter rule for an address that leads nowhere: REJECT where
// the Service has no endpoints at all, DROP where its policy Local finds none.
func (w *unitWriter) refuse(chain string, via proxy.Via, has bool, match matcher) {
	tag, about, target := proxy.TagReject, " has no endpoints", reject(w.cfg.Family)
	rule := &proxy.Rule{Table: "filter", Chain: chain, Service: w.svc.Name, Reason: "no-endpoints",
		Purpose: "refuse connections to the " + string(via) + " of " + w.key + ", which has no endpoints"}
	if has {
		tag, about, target = proxy.TagDrop, " has no local endpoints", "-j DROP"
		rule.Reason = "no-local-endpoints"
		rule.Purpose = "drop connections to the " + string(via) + " of " + w.key + ", which has no endpoints on this node"
	}
	rule.Tag = proxy.Tag{Kind: tag, ID: w.hash + viaLetter(via)}
	w.refusal(chain, rule, match, about, target)
}

// refuseRange adds the filter rule for packets to a load balancer's address
// that no source range let through.
func (w *unitWriter) refuseRange(fw string, match matcher) {
	w.refusal(chainProxyFirewall, &proxy.Rule{Tag: proxy.Tag{Kind: proxy.TagDrop, ID: w.hash + "f"},
		Table: "filter", Chain: chainProxyFirewall, Service: w.svc.Name, Reason: "source-range",
		Purpose: "drop connections to the LoadBalancer of " + w.key + " from outside its source ranges"},
		match, " traffic not accepted by "+fw, "-j DROP")
}

func (w *unitWriter) refusal(chain string, rule *proxy.Rule, match matcher, about, target string) {
	if !w.cfg.Trace {
		w.share("filter", chain, match(about, target))
		return
	}
	w.tag(rule)
	w.share("filter", chain, match(about, w.nflog(rule.Tag, nflogSize)), match(about, target))
}

// add adds a chain of the Service's own.
func (w *unitWriter) add(name string, rules []string) {
	w.chains = append(w.chains, chain{"nat", name, rules})
}

func (w *unitWriter) tag(r *proxy.Rule) {
	if w.detail >= tagged {
		w.rendered.tagged = append(w.rendered.tagged, r)
	}
}

// reached lists the endpoints that any chain leads to.
func (u *unit) reached() []netip.AddrPort {
	all := make([]netip.AddrPort, 0, len(u.sel.Cluster))
	cluster := u.svc.UsesCluster()
	if cluster {
		for i := range u.sel.Cluster {
			all = append(all, u.sel.Cluster[i].Addr)
		}
	}
	if !u.svc.UsesLocal() {
		return all
	}
	for i := range u.sel.Local {
		ep := u.sel.Local[i]
		if !cluster || !slices.ContainsFunc(u.sel.Cluster, func(e proxy.Endpoint) bool { return sameAddr(e, ep) }) {
			all = append(all, ep.Addr)
		}
	}
	return all
}

// reaches reports whether reached lists an endpoint.
func (u *unit) reaches(ep netip.AddrPort) bool {
	is := func(e proxy.Endpoint) bool { return e.Addr == ep }
	return u.svc.UsesCluster() && slices.ContainsFunc(u.sel.Cluster, is) ||
		u.svc.UsesLocal() && slices.ContainsFunc(u.sel.Local, is)
}

// endpoints writes the chains of endpoints.
func (w *unitWriter) endpoints(eps []netip.AddrPort) {
	w.chains = make([]chain, 0, len(eps)+4)
	for _, ep := range eps {
		w.endpoint(ep)
	}
}

func (w *unitWriter) endpoint(ep netip.AddrPort) {
	id := endpointHash(w.svc.Name, ep)
	name := prefixEndpoint + id
	if w.detail < whole {
		w.add(name, nil)
		return
	}
	about := w.aboutEndpoint(w.key)
	size := 2
	if w.cfg.Trace {
		size++
	}
	rules := make([]string, 0, size)
	rules = append(rules, line(from(host(ep.Addr())), about, jump(chainMarkMasq)))
	if w.cfg.Trace {
		tag := proxy.Tag{Kind: proxy.TagPick, ID: id}
		rules = append(rules, line(about, w.nflog(tag, nflogSize)))
		if w.detail >= tagged {
			w.tag(&proxy.Rule{Tag: tag, Table: "nat", Chain: name, Service: w.svc.Name,
				Endpoint: ep, Purpose: "pick " + ep.String() + " for " + w.key})
		}
	}
	affinity := ""
	if w.svc.Affinity > 0 {
		affinity = recent(w.cfg.Family, name, "--set")
	}
	rules = append(rules, line("-p "+w.proto, about, affinity, "-m "+w.proto, "-j DNAT --to-destination", ep.String()))
	w.add(name, rules)
}

// balance writes a chain that picks one of eps.
func (w *unitWriter) balance(name, internal string, eps []proxy.Endpoint, kind proxy.TagKind, id string) {
	if w.detail < whole {
		w.add(name, nil)
		return
	}
	size := 2 + len(eps)
	if w.svc.Affinity > 0 {
		size += len(eps)
	}
	rules := make([]string, 0, size)
	if name == internal {
		not := w.local
		if w.cfg.MasqueradeAll {
			not = detector{}
		}
		if w.cfg.MasqueradeAll || not.Tells() {
			rules = append(rules, line(not.source("!"), to(host(w.svc.ClusterIP)), not.device("!"), "-p "+w.proto,
				comment(w.key+" cluster IP"), dport(w.proto, w.svc.Port), jump(chainMarkMasq)))
		}
	}
	if w.svc.Affinity > 0 {
		seconds := strconv.FormatInt(int64(w.svc.Affinity.Seconds()), 10)
		for i := range eps {
			sep := prefixEndpoint + endpointHash(w.svc.Name, eps[i].Addr)
			rules = append(rules, line(w.aboutEndpoint(w.key+" -> "+eps[i].Addr.String()),
				recent(w.cfg.Family, sep, "--rcheck --seconds "+seconds+" --reap"), jump(sep)))
		}
		if w.cfg.Trace {
			tag := proxy.Tag{Kind: kind, ID: id}
			rules = append(rules, line(comment(w.key), w.nflog(tag, nflogSize)))
			w.tag(&proxy.Rule{Tag: tag, Table: "nat", Chain: name, Service: w.svc.Name,
				Purpose: "report that no session affinity of " + w.key + " holds for the client"})
		}
	}
	for i := range eps {
		sep := prefixEndpoint + endpointHash(w.svc.Name, eps[i].Addr)
		chance := ""
		if left := len(eps) - i; left > 1 {
			chance = "-m statistic --mode random --probability " + w.probability(left)
		}
		rules = append(rules, line(w.aboutEndpoint(w.key+" -> "+eps[i].Addr.String()), chance, jump(sep)))
	}
	w.add(name, rules)
}

// external writes the chain for traffic from outside the cluster.
func (w *unitWriter) external(ext, policy string, has bool) {
	if w.detail < whole {
		w.add(ext, nil)
		return
	}
	var rules []string
	about := func(s string) string { return comment(strings.Replace(s, "%", w.key, 1)) }
	cluster, local := jump(prefixService+w.hash), "-m addrtype --src-type LOCAL"
	if !w.svc.ExternalLocal {
		rules = append(rules, line(about("masquerade traffic for % external destinations"), jump(chainMarkMasq)))
	} else {
		if w.local.Tells() {
			rules = append(rules, line(w.local.source(""), w.local.device(""), about("pod traffic for % external destinations"), cluster))
		}
		rules = append(rules,
			line(about("masquerade LOCAL traffic for % external destinations"), local, jump(chainMarkMasq)),
			line(about("route LOCAL traffic for % external destinations"), local, cluster))
	}
	if has {
		rules = append(rules, jump(policy))
	}
	w.add(ext, rules)
}

// firewall writes the chain that lets the source ranges through.
func (w *unitWriter) firewall(fw, ext string) {
	if w.detail < whole {
		w.add(fw, nil)
		return
	}
	var rules []string
	about, node := comment(w.key+" loadbalancer IP"), false
	for _, cidr := range w.svc.SourceRanges {
		rules = append(rules, line(from(cidr.Masked()), about, jump(ext)))
		node = node || slices.ContainsFunc(w.node.Addrs, cidr.Contains)
	}
	if node {
		for _, ip := range w.svc.LoadBalancerIPs {
			rules = append(rules, line(from(host(ip)), about, jump(ext)))
		}
	}
	rules = append(rules, comment("other traffic to "+w.key+" will be dropped by "+chainProxyFirewall))
	w.add(fw, rules)
}

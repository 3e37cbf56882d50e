package userspace

import (
	"net/netip"
	"slices"
	"strconv"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// unit is one Service port's share of the program. It is immutable.
type unit struct {
	svc    proxy.Service // Endpoints are those that can be dialled
	sel    proxy.Select
	family xtables.Family
	hash   string
	rules  []rule
	tagged []*proxy.Rule
	// tags are those of the endpoints.
	tags map[netip.AddrPort]proxy.Tag
	// served says that some address leads to the listener.
	served bool
}

// key names the listener: dual-stack Services have two.
type key struct {
	name proxy.PortName
	six  bool
}

func (u *unit) key() key { return key{u.svc.Name, u.family == xtables.IPv6} }

// rule is one rule of a unit. Where it leads to the listener or is about its
// port, the port stands between text and rest.
type rule struct {
	chainKey
	text, rest string
	port       bool
	// before says that the next rule of the unit must stand behind it.
	before bool
}

func (r *rule) line(port uint16) string {
	if !r.port {
		return r.text
	}
	return r.text + strconv.Itoa(int(port)) + r.rest
}

// unitWriter makes one unit.
type unitWriter struct {
	*unit
	r          *renderer
	key, proto string
}

func (r *renderer) unit(u *unit) {
	n := u.svc.Name
	u.hash = serviceHash(n)
	w := unitWriter{unit: u, r: r, key: n.String(), proto: n.Proto.String()}
	w.write()
	w.index()
}

// index lists what the proxy's own events are tagged with. These rules are in
// no table of the kernel.
func (w *unitWriter) index() {
	w.tags = make(map[netip.AddrPort]proxy.Tag)
	for _, eps := range [][]proxy.Endpoint{w.sel.Cluster, w.sel.Local} {
		for i := range eps {
			ep := eps[i].Addr
			if _, ok := w.tags[ep]; ok {
				continue
			}
			tag := proxy.Tag{Kind: proxy.TagPick, ID: endpointHash(w.svc.Name, ep)}
			w.tags[ep] = tag
			w.tagged = append(w.tagged, &proxy.Rule{
				Tag: tag, Table: tableProxy, Chain: w.key, Service: w.svc.Name, Endpoint: ep,
				Purpose: "dial " + ep.String() + " for " + w.key,
			})
		}
	}
	w.tagged = append(w.tagged, &proxy.Rule{
		Tag: w.gone(), Table: tableProxy, Chain: w.key, Service: w.svc.Name, Reason: "no-endpoints",
		Purpose: "close a connection for which " + w.key + " has no endpoint any more",
	})
}

// gone is the tag of connections that came and found no endpoint.
func (u *unit) gone() proxy.Tag { return proxy.Tag{Kind: proxy.TagReject, ID: u.hash + "p"} }

// tableProxy stands for this process where rules have a table.
const tableProxy = "userspace"

func (w *unitWriter) write() {
	svc, sel := &w.svc, &w.sel
	has := len(sel.Cluster) > 0
	hasInternal, hasExternal := has, has
	if svc.InternalLocal {
		hasInternal = len(sel.Local) > 0
	}
	if svc.ExternalLocal {
		hasExternal = len(sel.Local) > 0
	}

	cluster := w.address(svc.ClusterIP)
	if hasInternal {
		w.lead(chainContainer, cluster, "")
		w.lead(chainHost, cluster, "")
	} else {
		w.refuse(proxy.ViaClusterIP, has, cluster, "")
	}
	for _, ip := range svc.ExternalIPs {
		w.outside(proxy.ViaExternalIP, chainContainer, chainHost, w.address(ip), "", has, hasExternal, nil)
	}
	ranges := slices.Clone(svc.SourceRanges)
	node := slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return slices.ContainsFunc(w.r.node.Addrs, p.Contains) })
	for _, ip := range svc.LoadBalancerIPs {
		sources := ranges
		if node {
			sources = append(slices.Clip(ranges), host(ip))
		}
		w.outside(proxy.ViaLoadBalancer, chainContainer, chainHost, w.address(ip), "", has, hasExternal, sources)
	}
	if svc.NodePort != 0 {
		match := func(source, device, about, more string) string {
			return line(source, device, "-p "+w.proto, comment(w.key+about), more, dport(w.proto, svc.NodePort))
		}
		w.outside(proxy.ViaNodePort, chainNodePortContainer, chainNodePortHost, match, "-m addrtype --dst-type LOCAL", has, hasExternal, nil)
		if has {
			w.add(rule{chainKey: chainKey{"filter", chainNonLocal}, port: true,
				text: line("-p "+w.proto, comment(w.key), "-m "+w.proto, "--dport "), rest: " -m conntrack --ctstate NEW -j ACCEPT"})
		}
	}
}

// matcher writes the match of one of the Service's addresses.
type matcher func(source, device, about, more string) string

func (w *unitWriter) address(ip netip.Addr) matcher {
	return func(source, device, about, more string) string {
		return line(source, to(ip), device, "-p "+w.proto, comment(w.key+about), more, dport(w.proto, w.svc.Port))
	}
}

// outside leads an address for outside clients to the listener. Where the policy
// Local finds no endpoint, pods and the node itself still get there, for they
// may use all; with sources only those get there.
func (w *unitWriter) outside(via proxy.Via, container, hostChain string, match matcher, local string, has, hasPolicy bool, sources []netip.Prefix) {
	switch {
	case !has:
	case len(sources) > 0:
		for _, s := range sources {
			w.leadFrom(container, match, from(s), "")
			w.leadFrom(hostChain, match, from(s), "")
		}
		w.refusal(&proxy.Rule{Tag: proxy.Tag{Kind: proxy.TagDrop, ID: w.hash + "f"}, Reason: "source-range",
			Purpose: "drop connections to the LoadBalancer of " + w.key + " from outside its source ranges"},
			match("", "", " source ranges", local), "-j DROP")
		return
	case hasPolicy:
		w.lead(container, match, "")
		w.lead(hostChain, match, "")
	default:
		if d := w.r.local(w.family); d.Tells() {
			w.leadFrom(container, match, source(d), device(d))
		}
		w.lead(hostChain, match, "")
	}
	if !hasPolicy {
		w.refuse(via, has, match, local)
	}
}

func (w *unitWriter) lead(chain string, match matcher, source string) {
	w.leadFrom(chain, match, source, "")
}

// leadFrom adds a rule that leads to the listener.
func (w *unitWriter) leadFrom(chain string, match matcher, source, device string) {
	w.served = true
	r := rule{chainKey: chainKey{"nat", chain}, port: true, text: match(source, device, "", "") + " -j REDIRECT --to-ports "}
	if to := w.r.target(w.family); to.IsValid() && (chain == chainContainer || chain == chainNodePortContainer) {
		addr := to.String()
		if to.Is6() {
			addr = "[" + addr + "]"
		}
		r.text = match(source, device, "", "") + " -j DNAT --to-destination " + addr + ":"
	}
	w.add(r)
}

func (w *unitWriter) add(r rule) { w.rules = append(w.rules, r) }

// refuse adds the rule for an address that leads nowhere: REJECT where the
// Service has no endpoints at all, DROP where its policy Local finds none.
func (w *unitWriter) refuse(via proxy.Via, has bool, match matcher, local string) {
	letter := map[proxy.Via]string{proxy.ViaNodePort: "n", proxy.ViaExternalIP: "e", proxy.ViaLoadBalancer: "l", proxy.ViaClusterIP: "c"}[via]
	about, target := " has no endpoints", reject(w.family)
	r := &proxy.Rule{Tag: proxy.Tag{Kind: proxy.TagReject, ID: w.hash + letter}, Reason: "no-endpoints",
		Purpose: "refuse connections to the " + string(via) + " of " + w.key + ", which has no endpoints"}
	if has {
		about, target = " has no local endpoints", "-j DROP"
		r.Tag.Kind, r.Reason = proxy.TagDrop, "no-local-endpoints"
		r.Purpose = "drop connections to the " + string(via) + " of " + w.key + ", which has no endpoints on this node"
	}
	w.refusal(r, match("", "", about, local), target)
}

func (w *unitWriter) refusal(r *proxy.Rule, match, target string) {
	where := chainKey{"filter", chainRefuse}
	if w.r.cfg.Trace {
		r.Table, r.Chain, r.Service = where.table, where.chain, w.svc.Name
		w.tagged = append(w.tagged, r)
		w.add(rule{chainKey: where, before: true, text: match + ` -j NFLOG --nflog-prefix "` + r.Tag.String() +
			`" --nflog-group ` + strconv.Itoa(int(w.r.cfg.NFLogGroup)) + " --nflog-size " + strconv.Itoa(nflogSize)})
	}
	w.add(rule{chainKey: where, text: match + " " + target})
}

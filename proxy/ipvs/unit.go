package ipvs

import (
	"net/netip"
	"slices"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// unit is one Service port's share of the kernel's state. It is immutable and
// lives from one Program to the next while the Service stays as it is.
type unit struct {
	svc proxy.Service // Endpoints are left out
	// cluster and local are the real servers of each policy, with those that
	// are out for a time at weight 0.
	cluster, local []real
	sel            proxy.Select
	scheduler      proxy.Scheduler

	virtuals []virtual
	entries  []entry
	// bound are addresses for kube-ipvs0.
	bound []netip.Addr
}

// same reports whether a unit made of svc and these servers would be the same.
func (u *unit) same(svc *proxy.Service, sel *proxy.Select, cluster, local []real) bool {
	a, b := &u.svc, svc
	return a.Name == b.Name && a.ClusterIP == b.ClusterIP && a.Port == b.Port && a.NodePort == b.NodePort &&
		a.Affinity == b.Affinity && a.InternalLocal == b.InternalLocal && a.ExternalLocal == b.ExternalLocal &&
		a.HealthCheckNodePort == b.HealthCheckNodePort && a.Scheduler == b.Scheduler &&
		slices.Equal(a.ExternalIPs, b.ExternalIPs) && slices.Equal(a.LoadBalancerIPs, b.LoadBalancerIPs) &&
		slices.Equal(a.SourceRanges, b.SourceRanges) &&
		u.sel.Policy == sel.Policy && u.sel.LocalPolicy == sel.LocalPolicy &&
		u.sel.Excluded == sel.Excluded && u.sel.LocalExcluded == sel.LocalExcluded &&
		slices.Equal(u.cluster, cluster) && slices.Equal(u.local, local)
}

// reals are the real servers of one policy: the chosen endpoints by weight, and
// at weight 0 those that only an outage keeps from being chosen, so that their
// connections live on.
func reals(chosen, all []proxy.Endpoint, o proxy.Overlay, local bool) []real {
	out := make([]real, 0, len(chosen))
	for i := range chosen {
		out = append(out, real{chosen[i].Addr, uint32(max(1, chosen[i].Weight))})
	}
	if len(o.Out) == 0 || len(chosen) == 0 {
		return out
	}
	for i := range all {
		ep := &all[i]
		if _, rests := o.Out[ep.Addr]; !rests || local && !ep.Local || !ep.Ready && !(ep.Serving && ep.Terminating) {
			continue
		}
		if !slices.ContainsFunc(out, func(r real) bool { return r.addr == ep.Addr }) {
			out = append(out, real{ep.Addr, 0})
		}
	}
	return out
}

// unitWriter makes one unit.
type unitWriter struct {
	*renderer
	*unit
}

func (r *renderer) unit(svc *proxy.Service, sel proxy.Select, cluster, local []real) *unit {
	u := &unit{svc: *svc, sel: sel, cluster: cluster, local: local, scheduler: r.scheduler}
	u.svc.Endpoints = nil
	if svc.Scheduler != "" {
		if s, err := proxy.ParseScheduler(svc.Scheduler); err == nil {
			u.scheduler = s
		}
	}
	w := unitWriter{r, u}
	w.write()
	return u
}

func (w *unitWriter) write() {
	svc := &w.svc
	w.address(svc.ClusterIP, proxy.ViaClusterIP, svc.InternalLocal)
	w.add(setClusterIP, svc.ClusterIP, svc.Port)
	for _, ip := range svc.ExternalIPs {
		w.address(ip, proxy.ViaExternalIP, svc.ExternalLocal)
		w.add(pick(svc.ExternalLocal, setExternalIPLocal, setExternalIP), ip, svc.Port)
	}
	limited := len(svc.SourceRanges) > 0
	for _, ip := range svc.LoadBalancerIPs {
		w.address(ip, proxy.ViaLoadBalancer, svc.ExternalLocal)
		w.add(setLoadBalancer, ip, svc.Port)
		if svc.ExternalLocal {
			w.add(setLoadBalancerLocal, ip, svc.Port)
		}
		if limited && len(w.cluster) > 0 {
			w.sourceRanges(ip)
		}
	}
	if svc.NodePort != 0 {
		w.nodePort()
	}
	if n := svc.HealthCheckNodePort; n != 0 {
		w.entries = append(w.entries, entry{set: setHealthCheck, ip6: w.ip6, port: n})
	}
	for _, list := range [][]real{w.cluster, w.local} {
		for _, r := range list {
			e := entry{set: setLoopBack, ip6: w.ip6, proto: svc.Name.Proto, port: r.addr.Port(), ip: r.addr.Addr(), other: r.addr.Addr()}
			if slices.Contains(w.entries, e) {
				continue
			}
			w.entries = append(w.entries, e)
			if w.cfg.Trace {
				w.add(setReal, r.addr.Addr(), r.addr.Port())
			}
		}
	}
}

func pick(local bool, a, b set) set {
	if local {
		return a
	}
	return b
}

func (w *unitWriter) add(s set, ip netip.Addr, port uint16) {
	w.entries = append(w.entries, entry{set: s, ip6: w.ip6, proto: w.svc.Name.Proto, port: port, ip: ip})
}

// address serves the Service's port on an address that is bound to kube-ipvs0,
// unless it is the node's own.
func (w *unitWriter) address(ip netip.Addr, via proxy.Via, local bool) {
	w.server(netip.AddrPortFrom(ip, w.svc.Port), via, local)
	if w.isLocal(ip) {
		return
	}
	w.bound = append(w.bound, ip)
	w.entries = append(w.entries, entry{set: setIPs, ip6: w.ip6, ip: ip})
}

// server makes one virtual server, or refuses what would come to it.
func (w *unitWriter) server(at netip.AddrPort, via proxy.Via, local bool) {
	servers := w.cluster
	if local {
		servers = w.local
	}
	if w.cfg.Trace {
		w.add(setVirtual, at.Addr(), at.Port())
	}
	switch {
	case len(servers) > 0:
	case len(w.cluster) > 0:
		w.add(setNoLocal, at.Addr(), at.Port())
		return
	default:
		w.add(setNoEndpoints, at.Addr(), at.Port())
		return
	}
	v := virtual{key: key{at, w.svc.Name.Proto}, scheduler: w.unit.scheduler.Name, reals: servers, via: via}
	if hashes := w.unit.scheduler.Name == "sh" || w.unit.scheduler.Name == "mh"; hashes && !w.unit.scheduler.NoFallback {
		v.flags |= flagFallback
	}
	if w.unit.scheduler.Port {
		v.flags |= flagPort
	}
	if w.svc.Affinity > 0 {
		v.flags, v.timeout = v.flags|flagPersistent, persistence(w.svc.Affinity)
	}
	w.virtuals = append(w.virtuals, v)
}

// sourceRanges limits who may use a load balancer's address.
func (w *unitWriter) sourceRanges(ip netip.Addr) {
	w.add(setLoadBalancerFW, ip, w.svc.Port)
	node := false
	for _, p := range w.svc.SourceRanges {
		e := entry{set: setSourceCIDR, ip6: w.ip6, proto: w.svc.Name.Proto, port: w.svc.Port, ip: ip, other: p.Addr(), bits: uint8(p.Bits())} //nolint:gosec // at most 128
		w.entries = append(w.entries, e)
		node = node || slices.ContainsFunc(w.node.Addrs, p.Contains)
	}
	if node { // which calls with that very address, for it is its own
		w.entries = append(w.entries, entry{set: setSourceIP, ip6: w.ip6, proto: w.svc.Name.Proto, port: w.svc.Port, ip: ip, other: ip})
	}
}

// nodePort serves the Service's node port on the node's addresses.
func (w *unitWriter) nodePort() {
	svc := &w.svc
	for _, ip := range w.nodePorts {
		w.server(netip.AddrPortFrom(ip, svc.NodePort), proxy.ViaNodePort, svc.ExternalLocal)
	}
	var all, local set
	switch svc.Name.Proto {
	case conntrack.UDP:
		all, local = setNodePortUDP, setNodePortLocalUDP
	case conntrack.SCTP:
		for _, ip := range w.nodePorts {
			w.add(setNodePortSCTP, ip, svc.NodePort)
			if svc.ExternalLocal {
				w.add(setNodePortLocalSCTP, ip, svc.NodePort)
			}
		}
		return
	default:
		all, local = setNodePortTCP, setNodePortLocalTCP
	}
	w.entries = append(w.entries, entry{set: all, ip6: w.ip6, port: svc.NodePort})
	if svc.ExternalLocal {
		w.entries = append(w.entries, entry{set: local, ip6: w.ip6, port: svc.NodePort})
	}
}

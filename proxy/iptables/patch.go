package iptables

import (
	"slices"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// rendering is what the last Render made, and of what. It is zero where nothing
// can be taken over from it.
type rendering struct {
	services []proxy.Service
	program  *program
}

// patch fills in p where no Service's addresses changed since the last Render,
// which is most of what happens in a cluster: then all Services are gone through,
// but only those that changed are checked and rendered, and no address is claimed
// anew. It reports false where more changed, and where anything is wrong.
func (b *Backend) patch(r *renderer, p *program, services []proxy.Service) bool {
	was := b.last.program
	if was == nil || len(was.problems) > 0 || len(services) != len(b.last.services) {
		return false
	}
	check := &proxy.Checker{IP6: b.cfg.Family == xtables.IPv6}
	units := was.units
	next := 0 // the unit of the next Service of the family
	for i := range services {
		old, now := &b.last.services[i], &services[i]
		if !sameAddresses(old, now) {
			return false
		}
		if !b.cfg.ours(now.ClusterIP) {
			continue
		}
		n := next
		next++
		if sameEndpoints(old.Endpoints, now.Endpoints) && sameRest(old, now) {
			continue
		}
		svc, ok := check.Service(now)
		if !ok || len(check.Problems) > 0 {
			return false
		}
		sel := svc.Select(p.node, proxy.Overlay{})
		u := units[n]
		if !u.same(&svc, &sel) {
			if &units[0] == &was.units[0] {
				units = slices.Clone(units)
			}
			u = r.unit(&svc, sel)
			units[n], b.memo[svc.Name] = u, u
		}
		u.from = now.Endpoints
	}
	p.units, p.claims, p.walks = units, was.claims, was.walks
	return true
}

// sameAddresses reports whether two Services have the same name, and claim the
// same addresses.
func sameAddresses(a, b *proxy.Service) bool {
	return a.Name == b.Name && a.ClusterIP == b.ClusterIP && a.Port == b.Port && a.NodePort == b.NodePort &&
		slices.Equal(a.ExternalIPs, b.ExternalIPs) && slices.Equal(a.LoadBalancerIPs, b.LoadBalancerIPs)
}

// sameRest compares what neither sameAddresses nor sameEndpoints looks at, as far
// as rules depend on it.
func sameRest(a, b *proxy.Service) bool {
	return a.Affinity == b.Affinity && a.InternalLocal == b.InternalLocal && a.ExternalLocal == b.ExternalLocal &&
		a.HealthCheckNodePort == b.HealthCheckNodePort && slices.Equal(a.SourceRanges, b.SourceRanges)
}

// sameEndpoints reports whether two Services have the same endpoints in the same
// place: Snapshots do not change, and take over from the last what stayed.
func sameEndpoints(a, b []proxy.Endpoint) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}

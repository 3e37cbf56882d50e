package ipvs

import (
	"net/netip"
	"slices"
	"sync"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// family is the memory of one family's renderings.
type family struct {
	memo      map[proxy.PortName]*unit
	node      proxy.Node
	nodePorts []netip.Addr
	local     []netip.Addr
	walks     *proxy.WalkCache[walkKey]
}

// renderer renders one family for one Config and Node.
type renderer struct {
	cfg       *Config
	ip6       bool
	node      proxy.Node
	detector  proxy.Detector
	scheduler proxy.Scheduler
	// nodePorts are the addresses that serve node ports, nodeAddrs all of the
	// node's.
	nodePorts, nodeAddrs []netip.Addr
}

// isLocal reports whether an address is the node's own already.
func (r *renderer) isLocal(ip netip.Addr) bool { return slices.Contains(r.nodeAddrs, ip) }

// Render says what should be in the kernel. Units of Services that did not
// change are taken over from the last call.
func (b *Backend) Render(s *proxy.Snapshot, o proxy.Overlay) proxy.Program {
	b.render.Lock()
	defer b.render.Unlock()
	p := &program{cfg: &b.cfg, node: s.Node, entries: 0}
	for i, ip6 := range []bool{false, true} {
		if ip6 && b.cfg.IPv4Only {
			continue
		}
		p.families = append(p.families, b.renderFamily(&b.families[i], ip6, s, o))
	}
	for _, f := range p.families {
		p.problems = append(p.problems, f.problems...)
		for _, u := range f.units {
			p.entries += len(u.entries)
		}
	}
	return p
}

func (b *Backend) renderFamily(mem *family, ip6 bool, s *proxy.Snapshot, o proxy.Overlay) *familyProgram {
	r := &renderer{cfg: &b.cfg, ip6: ip6, node: s.Node, detector: b.cfg.Detect.For(&s.Node, ip6), scheduler: b.scheduler}
	r.nodePorts = b.cfg.NodePorts.Addrs(&s.Node, ip6, false)
	all := proxy.NodePortConfig{LocalAddrs: b.cfg.NodePorts.LocalAddrs}
	r.nodeAddrs = all.Addrs(&s.Node, ip6, true)
	f := &familyProgram{ip6: ip6, local: r.nodeAddrs, bound: map[netip.Addr]bool{}, detector: r.detector}
	f.layout, f.tagged = r.rules()
	check := &proxy.Checker{IP6: ip6, Claims: make(map[proxy.Claim]proxy.Owner, len(s.Services))}
	memo := make(map[proxy.PortName]*unit, len(s.Services))
	same := sameNode(&mem.node, &s.Node) && slices.Equal(mem.nodePorts, r.nodePorts) && slices.Equal(mem.local, r.nodeAddrs)
	for i := range s.Services {
		svc, ok := check.Service(&s.Services[i])
		if !ok {
			continue
		}
		sel := svc.Select(s.Node, o)
		cluster, local := reals(sel.Cluster, svc.Endpoints, o, false), reals(sel.Local, svc.Endpoints, o, true)
		u := mem.memo[svc.Name]
		if u == nil || !same || !u.same(&svc, &sel, cluster, local) {
			u = r.unit(&svc, sel, cluster, local)
		}
		memo[svc.Name] = u
		f.units = append(f.units, u)
		for _, ip := range u.bound {
			f.bound[ip] = true
		}
	}
	if mem.walks == nil || !same {
		mem.walks = proxy.NewWalkCache[walkKey]()
	}
	f.cache = mem.walks
	mem.memo, mem.node, mem.nodePorts, mem.local = memo, s.Node, r.nodePorts, r.nodeAddrs
	f.claims, f.problems = check.Claims, check.Problems
	return f
}

func sameNode(a, b *proxy.Node) bool {
	return a.Name == b.Name && a.Zone == b.Zone && slices.Equal(a.Addrs, b.Addrs) && slices.Equal(a.PodCIDRs, b.PodCIDRs)
}

// program is what one Snapshot and Overlay ask for.
type program struct {
	cfg      *Config
	node     proxy.Node
	families []*familyProgram
	problems []proxy.Problem
	// entries is how many members all sets have, counted with doubles.
	entries int
}

// familyProgram is the part of one address family.
type familyProgram struct {
	ip6      bool
	units    []*unit // in the order of the Snapshot
	claims   map[proxy.Claim]proxy.Owner
	bound    map[netip.Addr]bool
	local    []netip.Addr
	detector proxy.Detector
	layout   xtables.Layout
	tagged   []*proxy.Rule
	problems []proxy.Problem

	cache *proxy.WalkCache[walkKey]

	walks sync.Once // guards rules
	rules *xtables.Walker
}

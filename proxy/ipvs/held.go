package ipvs

import (
	"net/netip"
	"slices"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// held is what the kernel is known to hold of ours, and the virtual servers of
// others where they are in our way.
type held struct {
	virtuals map[key]*heldVirtual
	entries  map[entry]*mark
	bound    map[netip.Addr]*mark
	layouts  []xtables.Layout // that were applied, by family
	round    mark
}

// mark is the round of comparing in which something was wanted last.
type mark uint32

type heldVirtual struct {
	settings
	key   key
	reals map[netip.AddrPort]*heldReal
	// foreign says that it is not ours, spared that it is in a range in which
	// nothing is removed.
	foreign, spared bool
	round           mark
	// draining says that it is there for connections alone.
	draining bool
}

type heldReal struct {
	weight uint32
	// other says that it forwards otherwise than by NAT.
	other bool
	round mark
	// leaving is when it goes, connections or not; zero while it is wanted.
	leaving time.Time
}

func newHeld() *held {
	return &held{virtuals: map[key]*heldVirtual{}, entries: map[entry]*mark{}, bound: map[netip.Addr]*mark{}}
}

// remember takes over since when real servers leave.
func (h *held) remember(before *held) {
	for at, v := range h.virtuals {
		old := before.virtuals[at]
		if old == nil {
			continue
		}
		for addr, r := range v.reals {
			if was := old.reals[addr]; was != nil && r.weight == 0 && !was.leaving.IsZero() {
				r.leaving = was.leaving
			}
		}
	}
}

// opKind is what is written.
type opKind uint8

const (
	addEntry opKind = iota
	delEntry
	addVirtual
	editVirtual
	delVirtual
	addReal
	editReal
	delReal
	addAddr
	delAddr
)

// op is one request to the kernel.
type op struct {
	kind     opKind
	entry    entry
	key      key
	settings settings
	real     real
	addr     netip.Addr
	// owner is for whom; nil for what nobody wants any more.
	owner *unit
	// leaving is when a real server set to weight 0 goes.
	leaving time.Time
	// draining goes with editReal for a virtual server nobody wants.
	draining bool
}

// plan is what turns what is held into what is wanted. Each list is written
// before the next one.
type plan struct {
	members []op // of sets, added
	servers []op // virtual and real servers, added and changed
	addrs   []op // added
	leave   []op // real servers to weight 0 or gone, virtual servers gone
	unbound []op // addresses removed
	stale   []op // members removed
	// problems are virtual servers of others where ours should be.
	problems map[*unit]error
}

// graceful reports whether connections of a protocol may end in peace. Those of
// UDP have no end that anybody sees.
func graceful(proto conntrack.Proto) bool { return proto != conntrack.UDP }

// compare makes the plan. until is when real servers that leave now are gone.
func (h *held) compare(p *program, until time.Time) *plan {
	h.round++
	out := &plan{problems: map[*unit]error{}}
	for _, f := range p.families {
		for _, u := range f.units {
			h.compareUnit(u, until, out)
		}
	}
	h.compareStale(until, out)
	return out
}

func (h *held) compareUnit(u *unit, until time.Time, out *plan) {
	for _, e := range u.entries {
		if m := h.entries[e]; m != nil {
			*m = h.round
			continue
		}
		m := h.round
		h.entries[e] = &m // so that it is written once; taken back if refused
		out.members = append(out.members, op{kind: addEntry, entry: e, owner: u})
	}
	for i := range u.virtuals {
		h.compareVirtual(u, &u.virtuals[i], until, out)
	}
	for _, ip := range u.bound {
		if m := h.bound[ip]; m != nil {
			*m = h.round
			continue
		}
		m := h.round
		h.bound[ip] = &m
		out.addrs = append(out.addrs, op{kind: addAddr, addr: ip, owner: u})
	}
}

func (h *held) compareVirtual(u *unit, v *virtual, until time.Time, out *plan) {
	have := h.virtuals[v.key]
	switch {
	case have == nil:
		out.servers = append(out.servers, op{kind: addVirtual, key: v.key, settings: v.settings(), owner: u})
		for _, r := range v.reals {
			out.servers = append(out.servers, op{kind: addReal, key: v.key, real: r, owner: u})
		}
		return
	case have.foreign:
		out.problems[u] = &foreignError{v.key}
		return
	}
	have.round = h.round
	if have.settings != v.settings() {
		out.servers = append(out.servers, op{kind: editVirtual, key: v.key, settings: v.settings(), owner: u})
	}
	have.draining = false
	for _, r := range v.reals {
		there := have.reals[r.addr]
		switch {
		case there == nil:
			out.servers = append(out.servers, op{kind: addReal, key: v.key, real: r, owner: u})
		case there.weight != r.weight || there.other || !there.leaving.IsZero():
			out.servers = append(out.servers, op{kind: editReal, key: v.key, real: r, owner: u})
			there.round = h.round
		default:
			there.round = h.round
		}
	}
	for addr, r := range have.reals {
		if r.round != h.round {
			h.leave(have, addr, r, until, false, u, out)
		}
	}
}

// leave lets a real server go.
func (h *held) leave(v *heldVirtual, addr netip.AddrPort, r *heldReal, until time.Time, draining bool, u *unit, out *plan) {
	switch {
	case !graceful(v.key.proto):
		out.leave = append(out.leave, op{kind: delReal, key: v.key, real: real{addr: addr}, owner: u})
	case r.weight != 0 || r.leaving.IsZero():
		out.leave = append(out.leave, op{kind: editReal, key: v.key, real: real{addr: addr}, leaving: until, draining: draining, owner: u})
	}
}

// compareStale finds what no unit wants. A virtual server with connections keeps
// its address and, where that is the node's own, its place in our sets, which
// says whose it is.
func (h *held) compareStale(until time.Time, out *plan) {
	kept := map[netip.Addr]bool{}
	ports := map[entry]bool{}
	for k, v := range h.virtuals {
		if v.round == h.round || v.foreign || v.spared {
			continue
		}
		if !graceful(k.proto) || len(v.reals) == 0 {
			out.leave = append(out.leave, op{kind: delVirtual, key: k})
			continue
		}
		v.draining = true
		for addr, r := range v.reals {
			h.leave(v, addr, r, until, true, nil, out)
		}
		kept[k.addr.Addr()] = true
		for _, e := range nodePortEntries(k) {
			ports[e] = true
		}
	}
	for ip, m := range h.bound {
		if *m != h.round && !kept[ip] {
			out.unbound = append(out.unbound, op{kind: delAddr, addr: ip})
		}
	}
	for e, m := range h.entries {
		if *m != h.round && !ports[e] {
			out.stale = append(out.stale, op{kind: delEntry, entry: e})
		}
	}
	slices.SortFunc(out.unbound, func(a, b op) int { return a.addr.Compare(b.addr) })
}

// nodePortEntries are the members of sets by which a virtual server at an
// address of the node is known to be ours.
func nodePortEntries(k key) []entry {
	ip6 := k.addr.Addr().Is6()
	switch k.proto {
	case conntrack.UDP:
		return []entry{{set: setNodePortUDP, ip6: ip6, port: k.addr.Port()}}
	case conntrack.SCTP:
		return []entry{{set: setNodePortSCTP, ip6: ip6, proto: k.proto, port: k.addr.Port(), ip: k.addr.Addr()}}
	}
	return []entry{{set: setNodePortTCP, ip6: ip6, port: k.addr.Port()}}
}

// owns reports whether a virtual server the kernel has is ours: its address is on
// our device, or it is in a set of ours. local tells the node's own addresses.
func (h *held) owns(k key, local func(netip.Addr) bool) bool {
	if h.bound[k.addr.Addr()] != nil {
		return true
	}
	for _, e := range nodePortEntries(k) {
		if h.entries[e] != nil && local(k.addr.Addr()) {
			return true
		}
	}
	for _, s := range []set{setClusterIP, setExternalIP, setExternalIPLocal, setLoadBalancer} {
		e := entry{set: s, ip6: k.addr.Addr().Is6(), proto: k.proto, port: k.addr.Port(), ip: k.addr.Addr()}
		if h.entries[e] != nil {
			return true
		}
	}
	return false
}

// took notes that the kernel took an op.
func (h *held) took(o *op) {
	switch o.kind {
	case delEntry:
		delete(h.entries, o.entry)
	case delAddr:
		delete(h.bound, o.addr)
	case addVirtual:
		h.virtuals[o.key] = &heldVirtual{settings: o.settings, key: o.key, reals: map[netip.AddrPort]*heldReal{}, round: h.round}
	case editVirtual:
		h.virtuals[o.key].settings = o.settings
	case delVirtual:
		delete(h.virtuals, o.key)
	case addReal, editReal:
		if v := h.virtuals[o.key]; v != nil {
			v.reals[o.real.addr] = &heldReal{weight: o.real.weight, leaving: o.leaving, round: h.round}
			v.draining = o.draining
		}
	case delReal:
		if v := h.virtuals[o.key]; v != nil {
			delete(v.reals, o.real.addr)
		}
	case addEntry, addAddr: // noted when it was planned
	}
}

// refused takes back what was noted when it was planned.
func (h *held) refused(o *op) {
	switch o.kind {
	case addEntry:
		delete(h.entries, o.entry)
	case addAddr:
		delete(h.bound, o.addr)
	default:
	}
}

// leavers lists the virtual servers of which real servers leave, or that do so
// themselves.
func (h *held) leavers() []*heldVirtual {
	var out []*heldVirtual
	for _, v := range h.virtuals {
		if v.draining {
			out = append(out, v)
			continue
		}
		for _, r := range v.reals {
			if !r.leaving.IsZero() {
				out = append(out, v)
				break
			}
		}
	}
	slices.SortFunc(out, func(a, b *heldVirtual) int { return a.key.addr.Compare(b.key.addr) })
	return out
}

// foreignError says that somebody else has a virtual server where ours should be.
type foreignError struct{ key key }

func (e *foreignError) Error() string {
	return "virtual server " + e.key.String() + " is not ours and is left alone: remove it, or start with --take-over"
}

// ownerName names a unit in errors.
func ownerName(u *unit) string {
	if u == nil {
		return "what is out of use"
	}
	return "Service " + u.svc.Name.String() + " " + u.svc.Name.Proto.String()
}

var _ proxy.Program = (*program)(nil)

// unneeded lists the addresses and members of sets that only drained virtual
// servers needed.
func (h *held) unneeded() []op {
	kept := map[netip.Addr]bool{}
	ports := map[entry]bool{}
	for k, v := range h.virtuals {
		if v.draining {
			kept[k.addr.Addr()] = true
			for _, e := range nodePortEntries(k) {
				ports[e] = true
			}
		}
	}
	var out []op
	for ip, m := range h.bound {
		if *m != h.round && !kept[ip] {
			out = append(out, op{kind: delAddr, addr: ip})
		}
	}
	for e, m := range h.entries {
		if *m != h.round && !ports[e] {
			out = append(out, op{kind: delEntry, entry: e})
		}
	}
	return out
}

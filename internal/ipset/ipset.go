// Package ipset reads what ipset save prints, and tells whether a packet is in a
// set, as the match set of iptables would. It is pure.
package ipset

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/kptrace/kptrace/internal/xtables"
)

// Sets are the sets of a node by their names.
type Sets map[string]*set

// set is one set. Its type is a storage, as hash, and what each part of an entry
// is: ip, net, port, iface, mark, mac, set.
type set struct {
	storage string
	kinds   []string
	ip6     bool
	// bitmask is laid on addresses before they are looked up, markmask on marks.
	bitmask  netip.Addr
	markmask uint32
	entries  []entry
	// except says that there are entries with nomatch.
	except bool
}

// entry is a member. One with nomatch takes what it holds out of the set.
type entry struct {
	parts   []part
	nomatch bool
}

// part is what an entry says of one dimension, by the kind of it.
type part struct {
	from, to netip.Addr
	bits     int
	proto    string
	low, top uint16
	name     string // of an interface or a set
	physdev  bool
	wildcard bool
	mark     uint32
}

// Match tells whether a packet is in a set, asked for as in --match-set NAME DIRS.
// It is not known of sets that are not there, and of what a Packet does not have:
// MAC addresses, and interfaces before they are known.
func (s Sets) Match(name string, dirs []string, p *xtables.Packet) xtables.Tri {
	x := s[name]
	switch {
	case x == nil:
		return xtables.Unknown
	case x.storage == "list":
		return s.list(x, dirs, p)
	case len(dirs) < len(x.kinds):
		return xtables.No // as the kernel says
	case x.hasFamily() && p.Dst.Is6() != x.ip6:
		return xtables.No
	}
	var best *entry
	unknown := false
	for i := range x.entries {
		switch e := &x.entries[i]; x.holds(e, dirs, p) {
		case xtables.Unknown:
			unknown = true
		case xtables.Yes:
			if best == nil || e.narrower(best) {
				best = e
			}
		case xtables.No:
		}
	}
	switch {
	case unknown && (best == nil || x.except):
		return xtables.Unknown
	case best == nil || best.nomatch:
		return xtables.No
	}
	return xtables.Yes
}

// list asks the members of a set of sets, in which there are no such again.
func (s Sets) list(x *set, dirs []string, p *xtables.Packet) xtables.Tri {
	found := xtables.No
	for i := range x.entries {
		name := x.entries[i].parts[0].name
		t := xtables.Unknown
		if m := s[name]; m != nil && m.storage != "list" {
			t = s.Match(name, dirs, p)
		}
		if t == xtables.Yes {
			return t
		}
		if t == xtables.Unknown {
			found = t
		}
	}
	return found
}

// hasFamily reports whether the set is for one family only.
func (x *set) hasFamily() bool {
	return slices.Contains(x.kinds, "ip") || slices.Contains(x.kinds, "net")
}

// narrower reports whether the kernel looks e up before o: the longer prefix
// first.
func (e *entry) narrower(o *entry) bool {
	for i := range e.parts {
		if e.parts[i].bits != o.parts[i].bits {
			return e.parts[i].bits > o.parts[i].bits
		}
	}
	return e.nomatch
}

func (x *set) holds(e *entry, dirs []string, p *xtables.Packet) xtables.Tri {
	all := xtables.Yes
	for i, kind := range x.kinds {
		switch x.part(kind, &e.parts[i], dirs[i] == "src", p) {
		case xtables.No:
			return xtables.No
		case xtables.Unknown:
			all = xtables.Unknown
		case xtables.Yes:
		}
	}
	return all
}

func (x *set) part(kind string, e *part, src bool, p *xtables.Packet) xtables.Tri {
	addr, port, iface, phys := p.Dst, p.DPort, p.Out, p.PhysOut
	if src {
		addr, port, iface, phys = p.Src, p.SPort, p.In, p.PhysIn
	}
	switch kind {
	case "ip", "net":
		addr = masked(addr, x.bitmask)
		return tri(e.from.Compare(addr) <= 0 && addr.Compare(e.to) <= 0)
	case "port":
		// A bitmap of ports is asked for TCP and UDP alone.
		known := x.storage != "bitmap" || p.Proto == "tcp" || p.Proto == "udp"
		return tri(known && (e.proto == "" || e.proto == p.Proto) && e.low <= port && port <= e.top)
	case "iface":
		if e.physdev {
			iface = phys
		}
		if iface == "" {
			return xtables.Unknown
		}
		return tri(e.name == iface || e.wildcard && strings.HasPrefix(iface, e.name))
	case "mark":
		return tri(p.Mark&x.markmask == e.mark)
	}
	return xtables.Unknown // mac
}

func tri(yes bool) xtables.Tri {
	if yes {
		return xtables.Yes
	}
	return xtables.No
}

// masked lays a mask on an address of its family.
func masked(a, mask netip.Addr) netip.Addr {
	if !mask.IsValid() {
		return a
	}
	b, m := a.AsSlice(), mask.AsSlice()
	if len(b) != len(m) {
		return a
	}
	for i := range b {
		b[i] &= m[i]
	}
	a, _ = netip.AddrFromSlice(b)
	return a
}

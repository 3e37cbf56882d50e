package xtables

import (
	"net/netip"
	"strings"
)

// addrType asks what kind of address ip is in the node's routing table.
func (o *Oracles) addrType(types string, ip netip.Addr, m *Match) Tri {
	limited := m.Opt("limit-iface-in") != nil || m.Opt("limit-iface-out") != nil
	local := o.local(ip)
	v4Broadcast := ip == netip.AddrFrom4([4]byte{255, 255, 255, 255})
	all := No
	for word := range strings.SplitSeq(types, ",") {
		t := Unknown
		switch word {
		case "LOCAL":
			if t = local; local == Yes && limited {
				t = Unknown
			}
		case "MULTICAST":
			t = tri(ip.IsMulticast())
		case "BROADCAST":
			if v4Broadcast {
				t = Yes
			} else if local == Yes || ip.Is6() || ip.IsMulticast() {
				t = No
			}
		case "UNICAST":
			if local == Yes || v4Broadcast || ip.IsMulticast() {
				t = No
			}
		}
		if t == Yes {
			return Yes
		}
		if t == Unknown {
			all = Unknown
		}
	}
	return all
}

// recent: --set matches always, the others if the address is in the list.
func (o *Oracles) recent(m *Match, p *Packet) Tri {
	for _, op := range [...]string{"set", "rcheck", "update", "remove"} {
		opt := m.Opt(op)
		if opt == nil {
			continue
		}
		t := Yes
		if op != "set" {
			if t = No; o.Recent != nil {
				name := ""
				if n := m.Opt("name"); n != nil {
					name = n.Value()
				}
				t = o.Recent(name, p)
			}
		}
		if opt.Not {
			t = t.not()
		}
		return t
	}
	return Unknown
}

func (o *Oracles) ipset(m *Match, p *Packet) Tri {
	opt := m.Opt("match-set")
	if opt == nil || len(opt.Values) != 2 || o.Set == nil {
		return Unknown
	}
	for i := range m.Opts {
		switch m.Opts[i].Name {
		case "match-set", "update-counters", "update-subcounters":
		default:
			return Unknown // depends on what the set counted
		}
	}
	t := o.Set(opt.Values[0], strings.Split(opt.Values[1], ","), p)
	if opt.Not {
		t = t.not()
	}
	return t
}

package xtables

import (
	"net/netip"
	"strings"
)

// State is what conntrack says of a packet, as the bits --ctstate matches.
type State uint8

// The states. A packet has one of the first five, and SNAT and DNAT besides.
const (
	StateInvalid State = 1 << iota
	StateNew
	StateRelated
	StateEstablished
	StateUntracked
	StateSNAT
	StateDNAT
)

// Packet is what a walk carries from rule to rule.
type Packet struct {
	// Proto is the name as in Rule.Proto: "tcp".
	Proto        string
	Src, Dst     netip.Addr
	SPort, DPort uint16
	// In and Out are the interfaces, "" where there is none (yet). PhysIn and
	// PhysOut are the bridge ports.
	In, Out         string
	PhysIn, PhysOut string
	Mark, CTMark    uint32
	State           State
	// Reply says that the packet goes against the direction in which the
	// connection was opened.
	Reply bool
	// TCPFlags are as in the header: FIN 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32.
	TCPFlags uint8
	// ICMPType and ICMPCode are for the protocols icmp and ipv6-icmp.
	ICMPType, ICMPCode uint8
	// OrigSrc and OrigDst are the ends as the connection was opened, before
	// any translation. A walk sets them where they are zero.
	OrigSrc, OrigDst netip.AddrPort
	// Masqueraded says that MASQUERADE gives it a source of the node.
	Masqueraded bool
}

// Tri is an answer that may be unknown.
type Tri uint8

// The answers.
const (
	No Tri = iota
	Yes
	Unknown
)

func tri(b bool) Tri {
	if b {
		return Yes
	}
	return No
}

func (t Tri) not() Tri {
	if t == Unknown {
		return t
	}
	return Yes - t
}

// Oracles answer what a ruleset does not say. Every field may be nil.
type Oracles struct {
	// Local reports whether an address is one of the node's (addrtype LOCAL,
	// and whether a packet is delivered or forwarded). Nil: only loopback.
	Local func(netip.Addr) bool
	// Recent reports whether the packet's source is in a list of the recent
	// match, within its time. Nil: it is not.
	Recent func(list string, p *Packet) Tri
	// Set reports whether the packet is in an ipset; dirs are "src" or "dst"
	// for each dimension. Nil: unknown.
	Set func(name string, dirs []string, p *Packet) Tri
	// Route sets In and Out after the destination may have changed. Nil: they
	// stay.
	Route func(p *Packet)
	// Other answers for matches that a walk knows nothing of. Nil: unknown.
	Other func(r *Rule, m *Match, p *Packet) Tri
}

func (o *Oracles) local(a netip.Addr) bool {
	if o.Local == nil {
		return a.IsLoopback()
	}
	return o.Local(a)
}

// Station is a built-in chain that a packet passes.
type Station struct {
	// Hook is the name for people ("prerouting"), Table and Chain what is
	// walked. A station whose chain the ruleset lacks is passed.
	Hook, Table, Chain string
	// If restricts the station to packets for the node itself (Yes) or for
	// others (No); Unknown means all packets.
	If Tri
	// Route says that the packet is routed before this station, also where If
	// then leaves it out.
	Route bool
}

// Received returns the stations of a packet that comes in by an interface.
func Received() []Station {
	s := stations(Unknown, "PREROUTING", "raw", "mangle", "nat")
	s = append(s, stations(Yes, "INPUT", "mangle", "filter", "security", "nat")...)
	s[3].Route = true
	s = append(s, stations(No, "FORWARD", "mangle", "filter", "security")...)
	return append(s, stations(No, "POSTROUTING", "mangle", "nat")...)
}

// Sent returns the stations of a packet that a process on the node sends. One
// for the node itself goes on through PREROUTING (raw and mangle) and INPUT of
// the loopback device, which is not part of it.
func Sent() []Station {
	s := stations(Unknown, "OUTPUT", "raw", "mangle", "nat", "filter", "security")
	s[3].Route = true
	return append(s, stations(Unknown, "POSTROUTING", "mangle", "nat")...)
}

func stations(cond Tri, chain string, tables ...string) []Station {
	out := make([]Station, len(tables))
	for i, t := range tables {
		out[i] = Station{Hook: strings.ToLower(chain), Table: t, Chain: chain, If: cond}
	}
	return out
}

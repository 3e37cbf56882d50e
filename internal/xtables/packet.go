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
	// MaybeLocal is asked in place of Local where the answer may be unknown: a
	// walk then goes both ways, and answers the same for an address from there
	// on.
	MaybeLocal func(netip.Addr) Tri
	// Device reports whether the packet came in (or, with out, goes out) by an
	// interface that a rule names; a trailing + stands for any end. Nil: In
	// and Out of the Packet tell.
	Device func(name string, out bool, p *Packet) Tri

	// answers are what was assumed on this way, ask the question that the last
	// evaluation left open.
	answers []answer
	ask     Question
}

// Question is what a walk could not know of the node. Exactly one field is set.
type Question struct {
	// Local asks whether an address is one of the node's own.
	Local netip.Addr
	// In and Out ask whether the packet's interface is the one a rule names.
	In, Out string
}

// String puts the question as a condition: "10.0.0.1 is an address of the node".
func (q Question) String() string {
	switch {
	case q.Local.IsValid():
		return q.Local.String() + " is an address of the node"
	case q.In != "":
		return "it came in by " + q.In
	}
	return "it goes out by " + q.Out
}

type answer struct {
	q   Question
	yes bool
}

func (o *Oracles) answered(q Question) Tri {
	for _, a := range o.answers {
		switch {
		case a.q == q:
			return tri(a.yes)
		case a.yes && (otherDevice(a.q.In, q.In) || otherDevice(a.q.Out, q.Out)):
			return No
		}
	}
	return Unknown
}

// otherDevice reports whether no interface is called by both names, of which
// each may end in + for any end.
func otherDevice(a, b string) bool {
	if a == "" || b == "" {
		return false
	}
	a, wildA := strings.CutSuffix(a, "+")
	b, wildB := strings.CutSuffix(b, "+")
	switch {
	case wildA && strings.HasPrefix(b, a), wildB && strings.HasPrefix(a, b):
		return false
	}
	return a != b
}

func (o *Oracles) local(a netip.Addr) Tri {
	if o.MaybeLocal != nil {
		t := o.MaybeLocal(a)
		if t == Unknown {
			t = o.answered(Question{Local: a})
		}
		if t == Unknown {
			o.ask = Question{Local: a}
		}
		return t
	}
	if o.Local == nil {
		return tri(a.IsLoopback())
	}
	return tri(o.Local(a))
}

// device tells whether an interface match holds.
func (o *Oracles) device(i Iface, out bool, p *Packet) Tri {
	name, q := p.In, Question{In: i.Name}
	if out {
		name, q = p.Out, Question{Out: i.Name}
	}
	if i.Name == "" || o.Device == nil || name != "" {
		return tri(matchIface(i, name))
	}
	t := o.Device(i.Name, out, p)
	if t == Unknown {
		t = o.answered(q)
	}
	if t == Unknown {
		o.ask = q
	} else if i.Not {
		t = t.not()
	}
	return t
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
	// In is the interface by which the packet comes in here, "" for the one by which
	// it came.
	In string
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

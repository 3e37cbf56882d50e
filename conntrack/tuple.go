package conntrack

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Proto is an IP protocol number as IANA assigns them.
type Proto uint8

// The protocols a Kubernetes Service can have, and ICMP, which reports on them.
const (
	ICMP   Proto = 1
	TCP    Proto = 6
	UDP    Proto = 17
	ICMPv6 Proto = 58
	SCTP   Proto = 132
)

// String returns the lower-case name iptables and /etc/protocols use, or the
// number where there is none.
func (p Proto) String() string {
	switch p {
	case ICMP:
		return "icmp"
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case ICMPv6:
		return "icmpv6"
	case SCTP:
		return "sctp"
	}
	return fmt.Sprintf("%d", uint8(p))
}

// ParseProto reads a protocol name in either case, as Kubernetes ("TCP") and
// iptables ("tcp") write it.
func ParseProto(s string) (Proto, error) {
	switch s {
	case "tcp", "TCP":
		return TCP, nil
	case "udp", "UDP":
		return UDP, nil
	case "sctp", "SCTP":
		return SCTP, nil
	case "icmp", "ICMP":
		return ICMP, nil
	case "icmpv6", "ICMPv6":
		return ICMPv6, nil
	}
	return 0, fmt.Errorf("conntrack: unknown protocol %q: use tcp, udp or sctp", s)
}

// Tuple is one direction of a connection: protocol and both ends. It is packed,
// fixed in size and comparable, so it serves as a map key for IPv4 and IPv6
// alike. IPv4 addresses are kept in their IPv4-mapped form.
//
// The zero Tuple is "no tuple"; see IsZero.
type Tuple struct {
	src, dst     [16]byte
	sport, dport uint16
	proto        Proto
}

// NewTuple packs a tuple. IPv4-mapped IPv6 addresses are the same as IPv4.
func NewTuple(proto Proto, src, dst netip.AddrPort) Tuple {
	return Tuple{
		src: src.Addr().As16(), dst: dst.Addr().As16(),
		sport: src.Port(), dport: dst.Port(), proto: proto,
	}
}

// TupleOf4 packs a tuple from raw IPv4 header bytes without allocating; src
// and dst must hold at least four bytes.
func TupleOf4(proto Proto, src, dst []byte, sport, dport uint16) Tuple {
	t := Tuple{sport: sport, dport: dport, proto: proto}
	t.src[10], t.src[11], t.dst[10], t.dst[11] = 0xff, 0xff, 0xff, 0xff
	copy(t.src[12:], src[:4])
	copy(t.dst[12:], dst[:4])
	return t
}

// TupleOf6 packs a tuple from raw IPv6 header bytes without allocating; src
// and dst must hold at least sixteen bytes.
func TupleOf6(proto Proto, src, dst []byte, sport, dport uint16) Tuple {
	t := Tuple{sport: sport, dport: dport, proto: proto}
	copy(t.src[:], src[:16])
	copy(t.dst[:], dst[:16])
	return t
}

// Proto returns the tuple's protocol.
func (t Tuple) Proto() Proto { return t.proto }

// Src returns the sending end.
func (t Tuple) Src() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(t.src).Unmap(), t.sport)
}

// Dst returns the receiving end.
func (t Tuple) Dst() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(t.dst).Unmap(), t.dport)
}

// Reverse returns the tuple of packets going the other way, untranslated.
func (t Tuple) Reverse() Tuple {
	return Tuple{src: t.dst, dst: t.src, sport: t.dport, dport: t.sport, proto: t.proto}
}

// WithDst returns the tuple with its receiving end replaced, as DNAT does.
func (t Tuple) WithDst(dst netip.AddrPort) Tuple {
	t.dst, t.dport = dst.Addr().As16(), dst.Port()
	return t
}

// IsZero reports whether t is the zero Tuple.
func (t Tuple) IsZero() bool { return t == Tuple{} }

// Is4 reports whether both ends are IPv4.
func (t Tuple) Is4() bool { return netip.AddrFrom16(t.src).Is4In6() }

// String returns "tcp 10.0.0.1:40000 > 10.96.0.10:80".
func (t Tuple) String() string {
	return t.proto.String() + " " + t.Src().String() + " > " + t.Dst().String()
}

// MarshalText returns what String does, and nothing for the zero Tuple.
func (t Tuple) MarshalText() ([]byte, error) {
	if t.IsZero() {
		return nil, nil
	}
	return []byte(t.String()), nil
}

// UnmarshalText reads what MarshalText wrote.
func (t *Tuple) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*t = Tuple{}
		return nil
	}
	words := strings.Fields(string(b))
	if len(words) != 4 || words[2] != ">" {
		return fmt.Errorf("conntrack: %q is no tuple", b)
	}
	proto, err := ParseProto(words[0])
	if err != nil {
		n, err := strconv.ParseUint(words[0], 10, 8)
		if err != nil {
			return fmt.Errorf("conntrack: %q is no tuple: unknown protocol", b)
		}
		proto = Proto(n)
	}
	src, err1 := netip.ParseAddrPort(words[1])
	dst, err2 := netip.ParseAddrPort(words[3])
	if err := errors.Join(err1, err2); err != nil {
		return fmt.Errorf("conntrack: %q is no tuple: %w", b, err)
	}
	*t = NewTuple(proto, src, dst)
	return nil
}

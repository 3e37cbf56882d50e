package nflog

import (
	"encoding/binary"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// Protocol numbers of IPv6 extension headers (RFC 8200, RFC 4302).
const (
	extHopByHop = 0
	extRouting  = 43
	extFragment = 44
	extAuth     = 51
	extDestOpts = 60
	// maxExt bounds the walk along them.
	maxExt = 8
)

// packet is an IP packet taken apart: views into the bytes, no copies.
type packet struct {
	proto    conntrack.Proto
	src, dst []byte
	id       uint16
	// later is a fragment after the first, which has no transport header.
	later   bool
	payload []byte
}

// parseIP reads an IP header of either version and IPv6's extension headers.
// The packet may be cut off anywhere behind them.
func parseIP(b []byte) (packet, bool) {
	if len(b) == 0 {
		return packet{}, false
	}
	switch b[0] >> 4 {
	case 4:
		return parse4(b)
	case 6:
		return parse6(b)
	}
	return packet{}, false
}

func parse4(b []byte) (packet, bool) {
	if len(b) < 20 {
		return packet{}, false
	}
	head := int(b[0]&0xf) * 4
	total := int(binary.BigEndian.Uint16(b[2:]))
	if total == 0 {
		// Larger than the field can say (BIG TCP).
		total = len(b)
	}
	if head < 20 || head > len(b) || total < head {
		return packet{}, false
	}
	return packet{
		proto: conntrack.Proto(b[9]), src: b[12:16], dst: b[16:20],
		id:      binary.BigEndian.Uint16(b[4:]),
		later:   binary.BigEndian.Uint16(b[6:])&0x1fff != 0,
		payload: b[head:min(total, len(b))],
	}, true
}

func parse6(b []byte) (packet, bool) {
	if len(b) < 40 {
		return packet{}, false
	}
	p := packet{src: b[8:24], dst: b[24:40]}
	next, rest := b[6], b[40:]
	if n := int(binary.BigEndian.Uint16(b[4:])); n != 0 {
		rest = rest[:min(n, len(rest))]
	}
	for range maxExt {
		size := 0
		switch next {
		case extHopByHop, extRouting, extDestOpts:
			if len(rest) >= 2 {
				size = (int(rest[1]) + 1) * 8
			}
		case extAuth:
			if len(rest) >= 2 {
				size = (int(rest[1]) + 2) * 4
			}
		case extFragment:
			size = 8
		default:
			p.proto, p.payload = conntrack.Proto(next), rest
			return p, true
		}
		if size == 0 || size > len(rest) {
			return packet{}, false
		}
		if next == extFragment && binary.BigEndian.Uint16(rest[2:])&0xfff8 != 0 {
			p.proto, p.later, p.payload = conntrack.Proto(rest[0]), true, rest[size:]
			return p, true
		}
		next, rest = rest[0], rest[size:]
	}
	return packet{}, false
}

// describe fills in the packet's part of e: tuple, IP id, TCP numbers. Of a
// later fragment and of protocols without ports it knows the addresses only.
// An ICMP packet's ports are as in conntrack.Conn.
func (p *packet) describe(e *trace.Event) bool {
	var sport, dport uint16
	b := p.payload
	switch {
	case p.later:
	case p.proto == conntrack.TCP, p.proto == conntrack.UDP, p.proto == conntrack.SCTP:
		if len(b) < 4 {
			return false
		}
		sport, dport = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
		if p.proto == conntrack.TCP && len(b) >= 8 {
			e.TCPSeq = binary.BigEndian.Uint32(b[4:])
			if len(b) >= 12 {
				e.TCPAck = binary.BigEndian.Uint32(b[8:])
			}
			if len(b) >= 14 {
				e.TCPFlags = b[13]
			}
		}
	case p.proto == conntrack.ICMP, p.proto == conntrack.ICMPv6:
		if len(b) < 8 {
			return false
		}
		sport, dport = binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b)
	}
	e.IPID = p.id
	if len(p.src) == 4 {
		e.Tuple = conntrack.TupleOf4(p.proto, p.src, p.dst, sport, dport)
	} else {
		e.Tuple = conntrack.TupleOf6(p.proto, p.src, p.dst, sport, dport)
	}
	return true
}

// describeICMP fills in e from an ICMP error: who sent it, what it says, and
// the packet it is about, of which RFC 792 promises eight bytes of transport.
func (p *packet) describeICMP(e *trace.Event) bool {
	if p.later || len(p.payload) < 8 {
		return false
	}
	typ, code := p.payload[0], p.payload[1]
	switch {
	case p.proto == conntrack.ICMP && (typ == 3 || typ == 4 || typ == 5 || typ == 11 || typ == 12):
	case p.proto == conntrack.ICMPv6 && typ >= 1 && typ <= 4:
	default:
		return false
	}
	quoted, ok := parseIP(p.payload[8:])
	if !ok || !quoted.describe(e) {
		return false
	}
	e.ICMPType, e.ICMPCode = typ, code
	if p.proto == conntrack.ICMP && typ == 3 && code == 4 || p.proto == conntrack.ICMPv6 && typ == 2 {
		e.ICMPMTU = binary.BigEndian.Uint16(p.payload[6:])
	}
	if len(p.src) == 4 {
		e.ICMPFrom = [16]byte{10: 0xff, 11: 0xff, 12: p.src[0], 13: p.src[1], 14: p.src[2], 15: p.src[3]}
	} else {
		e.ICMPFrom = [16]byte(p.src)
	}
	return true
}

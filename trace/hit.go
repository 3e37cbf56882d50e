package trace

import (
	"encoding/binary"
	"fmt"

	"github.com/kptrace/kptrace/conntrack"
)

// RuleHit is one report of a traced packet: a rule that matched, the end of a
// chain, or a policy. Both kinds of iptables and nf_tables give the same.
type RuleHit struct {
	Source SourceID
	// Time is nanoseconds since 1970: the kernel's stamp of the packet's arrival
	// where KernelTime is set, ours on reading otherwise.
	Time       int64
	KernelTime bool
	// Family is that of the table, as in an nfgenmsg: 2 is IPv4, 10 IPv6, 1 both,
	// 7 a bridge.
	Family       uint8
	Table, Chain string
	// Kind is HopRule, HopEnd or HopPolicy.
	Kind HopKind
	// Number is the rule's in its chain from 1 (legacy), Handle that of
	// nf_tables; one of them is 0.
	Number, Handle uint64
	// Verdict and Target are as in a Hop where the kernel tells (nf_tables),
	// else empty.
	Verdict, Target string
	// Hook is the netfilter hook's number where HasHook says so.
	Hook    uint8
	HasHook bool
	// TraceID joins the messages of one packet in one pass through a hook
	// (nf_tables), 0 where there is none. It may recur.
	TraceID uint32
	// Packet is the packet as it was when it met this, where HasPacket says so:
	// nf_tables tells it only once for each built-in chain.
	Packet    PacketHeader
	HasPacket bool
	Mark      uint32
	HasMark   bool
	// Devices by index, 0 where there is none.
	InDev, OutDev, PhysIn, PhysOut uint32
	// CTID, CTReply and CTState are conntrack's, where the kernel tells (nf_tables
	// of Linux 6.16): the id, whether the packet is a reply, and the state bit
	// as in nf_tables (2 established, 4 related, 8 new).
	CTID    uint32
	CTReply bool
	CTState uint32
}

// PacketHeader is what of a packet's headers tells packets apart and can change on
// the way.
type PacketHeader struct {
	Tuple    conntrack.Tuple
	TTL, TOS uint8
	// IPID and Len are of the IP header, in bytes with it (IPv6: without).
	IPID, Len uint16
	// TCPFlags, Seq and Ack are TCP's.
	TCPFlags uint8
	Seq, Ack uint32
	// Head is a sum of the first bytes behind a UDP header.
	Head uint32
}

// The TCP flags.
const (
	tcpFIN = 1 << iota
	tcpSYN
	tcpRST
	_
	tcpACK
)

// Name says what packet it is: see Path.Packet.
func (h *PacketHeader) Name() string {
	if h.Tuple.Proto() != conntrack.TCP {
		return h.Tuple.Proto().String()
	}
	switch f := h.TCPFlags; {
	case f&(tcpSYN|tcpACK) == tcpSYN|tcpACK:
		return "SYN-ACK"
	case f&tcpSYN != 0:
		return "SYN"
	case f&tcpRST != 0:
		return "RST"
	case f&tcpFIN != 0:
		return "FIN"
	case int(h.Len) > h.headers():
		return "data"
	}
	return "ACK"
}

// headers is about how long the headers before TCP's data are.
func (h *PacketHeader) headers() int {
	n := 32 // TCP with its usual time stamps
	if h.Tuple.Is4() {
		n += 20
	}
	return n
}

// PacketID tells a packet from others, unchanged by all that NAT does to it.
type PacketID struct {
	proto conntrack.Proto
	flags uint8
	ipid  uint16
	a, b  uint32
	size  uint16
}

// ID returns the packet's. Two packets have the same if one is an exact copy of
// the other, as a SYN-ACK sent again may be.
func (h *PacketHeader) ID() PacketID {
	id := PacketID{proto: h.Tuple.Proto(), ipid: h.IPID, size: h.Len}
	if id.proto == conntrack.TCP {
		id.flags, id.a, id.b = h.TCPFlags, h.Seq, h.Ack
		return id
	}
	id.a = h.Head
	return id
}

// String helps tests.
func (id PacketID) String() string {
	return fmt.Sprintf("%s id %d flags %x seq %d ack %d", id.proto, id.ipid, id.flags, id.a, id.b)
}

// ParseHeader reads a packet from its IP header on; it may be cut off behind
// the first 12 bytes of the transport's data.
func ParseHeader(b []byte) (PacketHeader, bool) {
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		n := int(b[0]&0xf) * 4
		if n < 20 || n > len(b) {
			return PacketHeader{}, false
		}
		return ParseHeaders(b[:20], b[n:])
	case len(b) >= 40 && b[0]>>4 == 6:
		return ParseHeaders(b[:40], b[40:])
	}
	return PacketHeader{}, false
}

// ParseHeaders reads an IP header without options or extensions, and what the
// transport begins with.
func ParseHeaders(ip, transport []byte) (PacketHeader, bool) {
	var h PacketHeader
	var proto conntrack.Proto
	first := true
	switch {
	case len(ip) >= 20 && ip[0]>>4 == 4:
		h.TOS, h.TTL, proto = ip[1], ip[8], conntrack.Proto(ip[9])
		h.Len, h.IPID = binary.BigEndian.Uint16(ip[2:]), binary.BigEndian.Uint16(ip[4:])
		first = binary.BigEndian.Uint16(ip[6:])&0x1fff == 0
	case len(ip) >= 40 && ip[0]>>4 == 6:
		h.TOS, h.TTL, proto = ip[0]<<4|ip[1]>>4, ip[7], conntrack.Proto(ip[6])
		h.Len = binary.BigEndian.Uint16(ip[4:])
	default:
		return PacketHeader{}, false
	}
	var sport, dport uint16
	t := transport
	switch {
	case !first:
	case proto == conntrack.TCP && len(t) >= 14:
		sport, dport = binary.BigEndian.Uint16(t), binary.BigEndian.Uint16(t[2:])
		h.Seq, h.Ack, h.TCPFlags = binary.BigEndian.Uint32(t[4:]), binary.BigEndian.Uint32(t[8:]), t[13]&0x3f
	case (proto == conntrack.UDP || proto == conntrack.SCTP) && len(t) >= 8:
		sport, dport = binary.BigEndian.Uint16(t), binary.BigEndian.Uint16(t[2:])
		for i, c := range t[8:min(len(t), 20)] {
			h.Head = h.Head*31 + uint32(c) + uint32(i)
		}
	case proto == conntrack.TCP || proto == conntrack.UDP || proto == conntrack.SCTP:
		return PacketHeader{}, false
	}
	if ip[0]>>4 == 4 {
		h.Tuple = conntrack.TupleOf4(proto, ip[12:16], ip[16:20], sport, dport)
	} else {
		h.Tuple = conntrack.TupleOf6(proto, ip[8:24], ip[24:40], sport, dport)
	}
	return h, true
}

// HitDecoder makes RuleHits of a Source's Frames. It is pure, as Decoder.
type HitDecoder interface {
	// DecodeHits appends the Frame's hits to into. Damaged data is counted and
	// never ends in a panic.
	DecodeHits(f Frame, into []RuleHit) []RuleHit
}

// Sighting is a packet seen on a device, outside of netfilter.
type Sighting struct {
	// Time is the kernel's, in nanoseconds since 1970.
	Time   int64
	Device uint32
	Packet PacketHeader
}

// DropNotice is the kernel giving up a packet.
type DropNotice struct {
	// Time is the kernel's, in nanoseconds since 1970.
	Time   int64
	Packet PacketHeader
	// Reason is the kernel's word, as "NETFILTER_DROP".
	Reason string
	// Function is the place in the kernel where that happened, Device the index of
	// the packet's device then; empty and 0 where unknown.
	Function string
	Device   uint32
}

// Resend is the TCP of this network namespace sending a segment again, because
// nobody acknowledged it in time.
type Resend struct {
	// Time is the kernel's, in nanoseconds since 1970.
	Time int64
	// Tuple and Seq are the segment's, as before any rule changed it. Opening says
	// that it is a SYN.
	Tuple   conntrack.Tuple
	Seq     uint32
	Opening bool
}

package nflog

import (
	"encoding/binary"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// gopacketEvent is what gopacket sees in a packet, as an Event; ok is false
// where it sees no transport header.
func gopacketEvent(b []byte, icmpError bool) (e trace.Event, ok bool) {
	first := layers.LayerTypeIPv4
	if len(b) > 0 && b[0]>>4 == 6 {
		first = layers.LayerTypeIPv6
	}
	p := gopacket.NewPacket(b, first, gopacket.NoCopy)
	var src, dst net.IP
	for _, l := range p.Layers() {
		// A header cut short gives a layer without contents.
		if len(l.LayerContents()) == 0 {
			return e, false
		}
		switch l := l.(type) {
		case *layers.IPv4:
			src, dst, e.IPID = l.SrcIP, l.DstIP, l.Id
		case *layers.IPv6:
			src, dst, e.IPID = l.SrcIP, l.DstIP, 0
		case *layers.TCP:
			e.TCPSeq, e.TCPAck, e.TCPFlags = l.Seq, l.Ack, l.Contents[13]
			e.Tuple = tuple(conntrack.TCP, src, dst, uint16(l.SrcPort), uint16(l.DstPort))
			return e, true
		case *layers.UDP:
			e.Tuple = tuple(conntrack.UDP, src, dst, uint16(l.SrcPort), uint16(l.DstPort))
			return e, true
		case *layers.SCTP:
			e.Tuple = tuple(conntrack.SCTP, src, dst, uint16(l.SrcPort), uint16(l.DstPort))
			return e, true
		case *layers.ICMPv4:
			if !icmpError {
				e.Tuple = tuple(conntrack.ICMP, src, dst, l.Id, uint16(l.TypeCode))
				return e, true
			}
			inner, ok := gopacketEvent(l.Payload, false)
			inner.ICMPType, inner.ICMPCode = l.TypeCode.Type(), l.TypeCode.Code()
			if l.TypeCode == layers.CreateICMPv4TypeCode(3, 4) {
				inner.ICMPMTU = l.Seq
			}
			inner.ICMPFrom = [16]byte(src.To16())
			return inner, ok
		case *layers.ICMPv6:
			if !icmpError || len(l.Payload) < 4 {
				return e, false
			}
			inner, ok := gopacketEvent(l.Payload[4:], false)
			inner.ICMPType, inner.ICMPCode = l.TypeCode.Type(), l.TypeCode.Code()
			if l.TypeCode.Type() == 2 {
				inner.ICMPMTU = binary.BigEndian.Uint16(l.Payload[2:])
			}
			inner.ICMPFrom = [16]byte(src.To16())
			return inner, ok
		}
	}
	return e, false
}

func tuple(proto conntrack.Proto, src, dst net.IP, sport, dport uint16) conntrack.Tuple {
	s, _ := netip.AddrFromSlice(src)
	d, _ := netip.AddrFromSlice(dst)
	return conntrack.NewTuple(proto, netip.AddrPortFrom(s, sport), netip.AddrPortFrom(d, dport))
}

// conform holds our header decoder against gopacket's on one packet: what
// gopacket understands we understand the same way.
func conform(t *testing.T, b []byte, icmpError bool) (understood bool) {
	t.Helper()
	want, ok := gopacketEvent(b, icmpError)
	if !ok {
		return false
	}
	var got trace.Event
	p, parsed := parseIP(b)
	if parsed && icmpError {
		parsed = p.describeICMP(&got)
	} else if parsed {
		parsed = p.describe(&got)
	}
	if !parsed {
		t.Errorf("gopacket reads %v, we nothing:\n% x", want.Tuple, b)
	} else if got != want {
		t.Errorf("packet % x\n got %+v\nwant %+v", b, got, want)
	}
	return true
}

// generator makes packets of every shape a rule can report.
type generator struct{ *rand.Rand }

func (g generator) bytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(g.Uint32())
	}
	return b
}

// transport returns the layers above IP of a TCP, UDP or SCTP packet.
func (g generator) transport() (layers.IPProtocol, []gopacket.SerializableLayer) {
	sport, dport := uint16(g.Uint32()), uint16(g.Uint32())
	payload := gopacket.Payload(g.bytes(g.IntN(200)))
	switch g.IntN(3) {
	case 0:
		tcp := &layers.TCP{
			SrcPort: layers.TCPPort(sport), DstPort: layers.TCPPort(dport),
			Seq: g.Uint32(), Ack: g.Uint32(), SYN: true, Window: 1000,
		}
		if g.IntN(2) == 0 {
			tcp.Options = []layers.TCPOption{
				{OptionType: layers.TCPOptionKindMSS, OptionLength: 4, OptionData: []byte{5, 180}},
				{OptionType: layers.TCPOptionKindSACKPermitted, OptionLength: 2},
			}
		}
		return layers.IPProtocolTCP, []gopacket.SerializableLayer{tcp, payload}
	case 1:
		return layers.IPProtocolUDP, []gopacket.SerializableLayer{
			&layers.UDP{SrcPort: layers.UDPPort(sport), DstPort: layers.UDPPort(dport)}, payload}
	default:
		return layers.IPProtocolSCTP, []gopacket.SerializableLayer{
			&layers.SCTP{SrcPort: layers.SCTPPort(sport), DstPort: layers.SCTPPort(dport), VerificationTag: g.Uint32()}}
	}
}

// packet returns a whole packet of either family.
func (g generator) packet() []byte {
	proto, above := g.transport()
	return g.ip(g.IntN(2) == 0, proto, above...)
}

// ip puts an IP header in front, with options or extension headers at times.
func (g generator) ip(v6 bool, proto layers.IPProtocol, above ...gopacket.SerializableLayer) []byte {
	var below []gopacket.SerializableLayer
	if !v6 {
		ip := &layers.IPv4{
			Version: 4, TTL: 64, Protocol: proto, Id: uint16(g.Uint32()),
			SrcIP: g.bytes(4), DstIP: g.bytes(4),
		}
		if g.IntN(4) == 0 {
			ip.Options = []layers.IPv4Option{{OptionType: 148, OptionLength: 4, OptionData: []byte{0, 0}}}
		}
		below = append(below, ip)
	} else {
		ip := &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: proto, SrcIP: g.bytes(16), DstIP: g.bytes(16)}
		below = append(below, ip)
		if g.IntN(4) == 0 {
			ip.NextHeader = layers.IPProtocolIPv6Destination
			opts := &layers.IPv6Destination{Options: []*layers.IPv6DestinationOption{{OptionType: 0x1e, OptionData: g.bytes(4)}}}
			opts.NextHeader = proto
			below = append(below, opts)
		}
	}
	buf := gopacket.NewSerializeBuffer()
	opts := gopacket.SerializeOptions{FixLengths: true}
	if err := gopacket.SerializeLayers(buf, opts, append(below, above...)...); err != nil {
		panic(err)
	}
	return buf.Bytes()
}

// icmp returns an ICMP error of the quoted packet's family, quoting all of it
// or the eight bytes of transport that RFC 792 promises.
func (g generator) icmp() []byte {
	quoted := g.packet()
	if quoted[0]>>4 == 6 {
		return g.ip(true, layers.IPProtocolICMPv6,
			&layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeDestinationUnreachable, uint8(g.IntN(7)))},
			gopacket.Payload(append(make([]byte, 4), quoted...)))
	}
	if g.IntN(2) == 0 {
		quoted = quoted[:min(int(quoted[0]&0xf)*4+8, len(quoted))]
	}
	return g.ip(false, layers.IPProtocolICMPv4,
		&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(layers.ICMPv4TypeDestinationUnreachable, uint8(g.IntN(16)))},
		gopacket.Payload(quoted))
}

func TestGopacketGenerated(t *testing.T) {
	g := generator{rand.New(rand.NewPCG(1, 2))}
	understood := 0
	const rounds = 20_000
	for range rounds {
		b := g.packet()
		if conform(t, b, false) {
			understood++
		}
		// Cut off as by a copy range: gopacket gives up earlier than we do.
		conform(t, b[:min(len(b), 40+g.IntN(100))], false)
		if conform(t, g.icmp(), true) {
			understood++
		}
		if t.Failed() {
			break
		}
	}
	// gopacket does not read the eight bytes of TCP in a short quotation, nor
	// a quoted packet behind extension headers cut off; all else it must.
	if understood < rounds*2*85/100 {
		t.Errorf("gopacket understood %d of %d packets, the comparison is worth little", understood, rounds*2)
	}
}

func TestShortQuotation(t *testing.T) {
	g := generator{rand.New(rand.NewPCG(3, 4))}
	inner := g.ip(false, layers.IPProtocolTCP, &layers.TCP{SrcPort: 40000, DstPort: 80, Seq: 0x01020304, Ack: 9})
	whole := g.ip(false, layers.IPProtocolICMPv4,
		&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(3, 1)}, gopacket.Payload(inner[:len(inner)-12]))
	p, ok := parseIP(whole)
	var e trace.Event
	if !ok || !p.describeICMP(&e) {
		t.Fatal("not understood")
	}
	if e.Tuple.Src().Port() != 40000 || e.Tuple.Dst().Port() != 80 || e.TCPSeq != 0x01020304 || e.TCPAck != 0 || e.ICMPCode != 1 {
		t.Errorf("got %+v", e)
	}
}

func TestFragments(t *testing.T) {
	g := generator{rand.New(rand.NewPCG(5, 6))}
	for _, v6 := range []bool{false, true} {
		b := g.ip(v6, layers.IPProtocolUDP, &layers.UDP{SrcPort: 1, DstPort: 2})
		if v6 {
			frag := []byte{17, 0, 0, 8 << 3, 0, 0, 0, 1}
			head := append([]byte{}, b[:40]...)
			if head[6] != 17 {
				t.Fatal("the generator added extension headers")
			}
			head[6], head[5] = extFragment, head[5]+8
			b = append(append(head, frag...), b[40:]...)
		} else {
			b[7] = 8 // a fragment offset
		}
		p, ok := parseIP(b)
		var e trace.Event
		if !ok || !p.describe(&e) || !p.later {
			t.Fatalf("IPv6 %v: not understood", v6)
		}
		if e.Tuple.Proto() != conntrack.UDP || e.Tuple.Src().Port() != 0 || e.Tuple.Dst().Port() != 0 {
			t.Errorf("IPv6 %v: a later fragment has ports: %v", v6, e.Tuple)
		}
	}
}

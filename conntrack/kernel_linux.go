package conntrack

import (
	"encoding/binary"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	ct "github.com/ti-mo/conntrack"

	"github.com/kptrace/kptrace/internal/nfnl"
)

// Numbers of linux/netfilter/nfnetlink_conntrack.h.
const (
	msgGet      = 1
	msgDelete   = 2
	msgGetStats = 5

	ctaTupleOrig = 1
	ctaID        = 12

	ctaTupleIP, ctaTupleProto                 = 1, 2
	ctaIPv4Src, ctaIPv4Dst                    = 1, 2
	ctaIPv6Src, ctaIPv6Dst                    = 3, 4
	ctaProtoNum, ctaProtoSport, ctaProtoDport = 1, 2, 3
	ctaICMPID, ctaICMPType, ctaICMPCode       = 4, 5, 6
	ctaICMPv6ID, ctaICMPv6Type, ctaICMPv6Code = 7, 8, 9

	ctaGlobalEntries, ctaGlobalMaxEntries = 1, 2

	// nested marks an attribute that holds others (linux/netlink.h).
	nested = 1 << 15
)

// family is t's address family in a request.
func family(t Tuple) uint8 {
	if t.Is4() {
		return nfnl.FamilyIPv4
	}
	return nfnl.FamilyIPv6
}

// icmpPort packs type and code of an ICMP entry into a Tuple's receiving port;
// the sending port is the echo id.
func icmpPort(typ, code uint8) uint16 { return uint16(typ)<<8 | uint16(code) }

// tupleOf reads one of the kernel's tuples.
func tupleOf(k *ct.Tuple) Tuple {
	src, dst := k.IP.SourceAddress, k.IP.DestinationAddress
	if !src.IsValid() || !dst.IsValid() {
		return Tuple{}
	}
	t := Tuple{
		src: src.As16(), dst: dst.As16(), proto: Proto(k.Proto.Protocol),
		sport: k.Proto.SourcePort, dport: k.Proto.DestinationPort,
	}
	if t.proto == ICMP || t.proto == ICMPv6 {
		t.sport, t.dport = k.Proto.ICMPID, icmpPort(k.Proto.ICMPType, k.Proto.ICMPCode)
	}
	return t
}

// appendTuple appends t as an attribute.
func appendTuple(b []byte, typ uint16, t Tuple) []byte {
	var ip, proto []byte
	if t.Is4() {
		ip = nfnl.AppendAttr(ip, ctaIPv4Src, t.src[12:]...)
		ip = nfnl.AppendAttr(ip, ctaIPv4Dst, t.dst[12:]...)
	} else {
		ip = nfnl.AppendAttr(ip, ctaIPv6Src, t.src[:]...)
		ip = nfnl.AppendAttr(ip, ctaIPv6Dst, t.dst[:]...)
	}
	proto = nfnl.AppendAttr(proto, ctaProtoNum, uint8(t.proto))
	sport := binary.BigEndian.AppendUint16(nil, t.sport)
	switch t.proto {
	case ICMP:
		proto = nfnl.AppendAttr(proto, ctaICMPID, sport...)
		proto = nfnl.AppendAttr(proto, ctaICMPType, uint8(t.dport>>8))
		proto = nfnl.AppendAttr(proto, ctaICMPCode, uint8(t.dport))
	case ICMPv6:
		proto = nfnl.AppendAttr(proto, ctaICMPv6ID, sport...)
		proto = nfnl.AppendAttr(proto, ctaICMPv6Type, uint8(t.dport>>8))
		proto = nfnl.AppendAttr(proto, ctaICMPv6Code, uint8(t.dport))
	default:
		proto = nfnl.AppendAttr(proto, ctaProtoSport, sport...)
		proto = nfnl.AppendAttr(proto, ctaProtoDport, binary.BigEndian.AppendUint16(nil, t.dport)...)
	}
	inner := nfnl.AppendAttr(nil, ctaTupleIP|nested, ip...)
	inner = nfnl.AppendAttr(inner, ctaTupleProto|nested, proto...)
	return nfnl.AppendAttr(b, typ|nested, inner...)
}

// flowOf reads one of the kernel's entries.
func flowOf(k *ct.Flow) Flow {
	f := Flow{
		Orig: tupleOf(&k.TupleOrig), Reply: tupleOf(&k.TupleReply),
		ID: k.ID, Status: Status(k.Status.Value), Mark: k.Mark,
		Timeout: time.Duration(k.Timeout) * time.Second,
		Out:     Counters{Packets: k.CountersOrig.Packets, Bytes: k.CountersOrig.Bytes},
		In:      Counters{Packets: k.CountersReply.Packets, Bytes: k.CountersReply.Bytes},
		Start:   k.Timestamp.Start, Stop: k.Timestamp.Stop,
	}
	if k.ProtoInfo.TCP != nil {
		f.State = TCPState(k.ProtoInfo.TCP.State)
	}
	return f
}

// addProc adds what only /proc/net/stat/nf_conntrack tells: a line of names,
// and one of hexadecimal numbers per CPU.
func (s *Stats) addProc(file io.ReaderAt) error {
	text, err := io.ReadAll(io.NewSectionReader(file, 0, 1<<20))
	if err != nil {
		return err
	}
	names, rest, _ := strings.Cut(string(text), "\n")
	columns := strings.Fields(names)
	for line := range strings.Lines(rest) {
		for i, value := range strings.Fields(line) {
			if i >= len(columns) {
				break
			}
			n, err := strconv.ParseUint(value, 16, 64)
			if err != nil {
				return fmt.Errorf("column %s: %w", columns[i], err)
			}
			switch columns[i] {
			case "clashres":
				s.ClashResolve += n
			case "chainlength":
				s.ChainTooLong += n
			}
		}
	}
	return nil
}

package ipvs

import (
	"encoding/binary"
	"net/netip"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/nlbatch"
)

// Commands and attributes of IPVS's generic netlink family (linux/ip_vs.h).
const (
	cmdNewService = 1
	cmdSetService = 2
	cmdDelService = 3
	cmdNewDest    = 5
	cmdSetDest    = 6
	cmdDelDest    = 7
	genlVersion   = 1

	attrService = 1
	attrDest    = 2

	svcFamily    = 1
	svcProtocol  = 2
	svcAddr      = 3
	svcPort      = 4
	svcScheduler = 6
	svcFlags     = 7
	svcTimeout   = 8
	svcNetmask   = 9

	destAddr    = 1
	destPort    = 2
	destForward = 3
	destWeight  = 4
	destUpper   = 5
	destLower   = 6
	destFamily  = 11

	forwardNAT  = 0 // IP_VS_CONN_F_MASQ
	forwardMask = 7 // IP_VS_CONN_F_FWD_MASK
)

// Commands and attributes of ipset (linux/netfilter/ipset/ip_set.h).
const (
	subsysIPSet   = 6
	ipsetAdd      = 9
	ipsetDel      = 10
	ipsetProtocol = 6

	setProtocol = 1
	setName     = 2
	setData     = 7
	dataIP      = 1
	dataPort    = 4
	dataProto   = 7
	dataIP2     = 20
	dataCIDR2   = 21
	ipv4        = 1
	ipv6        = 2
)

// Linux's numbers, whatever system decodes or renders.
const (
	afInet  = 2
	afInet6 = 10

	rtmNewAddr = 20
	rtmDelAddr = 21
	ifaLocal   = 2
	ifaAddress = 1
	// ifaNoDAD: nobody else is asked whether he has the address, for many nodes
	// do.
	ifaNoDAD = 2
)

func familyOf(ip netip.Addr) uint16 {
	if ip.Is6() {
		return afInet6
	}
	return afInet
}

// ipvsMessage is the request to IPVS for an op; family is the number that the
// kernel gave the generic netlink family.
func ipvsMessage(family uint16, o *op) nlbatch.Message {
	cmd := map[opKind]byte{addVirtual: cmdNewService, editVirtual: cmdSetService, delVirtual: cmdDelService,
		addReal: cmdNewDest, editReal: cmdSetDest, delReal: cmdDelDest}[o.kind]
	b := make([]byte, 0, 160)
	b = append(b, cmd, genlVersion, 0, 0)
	b = nlbatch.Nest(b, attrService, func(b []byte) []byte {
		b = nlbatch.Uint16(b, svcFamily, familyOf(o.key.addr.Addr()))
		b = nlbatch.Uint16(b, svcProtocol, uint16(o.key.proto))
		b = addrAttr(b, svcAddr, o.key.addr.Addr())
		b = portAttr(b, svcPort, o.key.addr.Port())
		if o.kind == addVirtual || o.kind == editVirtual {
			b = nlbatch.String(b, svcScheduler, o.settings.scheduler)
			flags := binary.NativeEndian.AppendUint32(nil, o.settings.flags)
			b = nlbatch.Attr(b, svcFlags, binary.NativeEndian.AppendUint32(flags, flagsOurs)...)
			b = nlbatch.Uint32(b, svcTimeout, o.settings.timeout)
			// Affinity is that of the whole address.
			mask := uint32(1<<32 - 1)
			if o.key.addr.Addr().Is6() {
				mask = 128
			}
			b = nlbatch.Uint32(b, svcNetmask, mask)
		}
		return b
	})
	if o.kind == addReal || o.kind == editReal || o.kind == delReal {
		b = nlbatch.Nest(b, attrDest, func(b []byte) []byte {
			b = addrAttr(b, destAddr, o.real.addr.Addr())
			b = portAttr(b, destPort, o.real.addr.Port())
			b = nlbatch.Uint16(b, destFamily, familyOf(o.real.addr.Addr()))
			if o.kind != delReal {
				b = nlbatch.Uint32(b, destForward, forwardNAT)
				b = nlbatch.Uint32(b, destWeight, o.real.weight)
				b = nlbatch.Uint32(b, destUpper, 0)
				b = nlbatch.Uint32(b, destLower, 0)
			}
			return b
		})
	}
	return nlbatch.Message{Type: family, Body: b}
}

// addrAttr writes a union nf_inet_addr.
func addrAttr(b []byte, typ uint16, ip netip.Addr) []byte {
	var a [16]byte
	copy(a[:], ip.AsSlice())
	return nlbatch.Attr(b, typ, a[:]...)
}

func portAttr(b []byte, typ, port uint16) []byte {
	return nlbatch.Attr(b, typ, binary.BigEndian.AppendUint16(nil, port)...)
}

// setMessage is the request to ipset for an op. A member that is there, or one
// that is gone, is no error without FlagExcl.
func setMessage(o *op) nlbatch.Message {
	e := &o.entry
	cmd, family := uint16(ipsetAdd), byte(afInet)
	if o.kind == delEntry {
		cmd = ipsetDel
	}
	if e.ip6 {
		family = afInet6
	}
	b := make([]byte, 0, 128)
	b = append(b, family, 0, 0, 0)
	b = nlbatch.Attr(b, setProtocol, ipsetProtocol)
	b = nlbatch.String(b, setName, e.set.name(e.ip6))
	b = nlbatch.Nest(b, setData, func(b []byte) []byte {
		if e.ip.IsValid() {
			b = setAddr(b, dataIP, e.ip)
		}
		if e.set.def().kind != typeIP {
			b = nlbatch.Attr(b, dataPort|nlbatch.NetOrder, binary.BigEndian.AppendUint16(nil, e.port)...)
			if e.proto != 0 {
				b = nlbatch.Attr(b, dataProto, byte(e.proto))
			}
		}
		if e.other.IsValid() {
			b = setAddr(b, dataIP2, e.other)
			if e.set.def().kind == typeIPPortNet {
				b = nlbatch.Attr(b, dataCIDR2, e.bits)
			}
		}
		return b
	})
	return nlbatch.Message{Type: subsysIPSet<<8 | cmd, Body: b}
}

func setAddr(b []byte, typ uint16, ip netip.Addr) []byte {
	kind := uint16(ipv4)
	if ip.Is6() {
		kind = ipv6
	}
	return nlbatch.Nest(b, typ, func(b []byte) []byte {
		return nlbatch.Attr(b, kind|nlbatch.NetOrder, ip.AsSlice()...)
	})
}

// addrMessage is the request to give the device with an index an address, or to
// take it away.
func addrMessage(index uint32, o *op) nlbatch.Message {
	m := nlbatch.Message{Type: rtmNewAddr, Flags: nlbatch.FlagCreate | nlbatch.FlagReplace}
	flags := byte(0)
	if o.addr.Is6() {
		flags = ifaNoDAD
	}
	if o.kind == delAddr {
		m.Type, m.Flags, flags = rtmDelAddr, 0, 0
	}
	b := []byte{byte(familyOf(o.addr)), byte(o.addr.BitLen()), flags, 0}
	b = binary.NativeEndian.AppendUint32(b, index)
	b = nlbatch.Attr(b, ifaLocal, o.addr.AsSlice()...)
	m.Body = nlbatch.Attr(b, ifaAddress, o.addr.AsSlice()...)
	return m
}

// protoOf reads a protocol number, zero for one that is no Service's.
func protoOf(n uint16) conntrack.Proto {
	switch p := conntrack.Proto(n); p { //nolint:gosec // compared below
	case conntrack.TCP, conntrack.UDP, conntrack.SCTP:
		return p
	}
	return 0
}

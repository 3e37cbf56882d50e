package ipvs

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/nlbatch"
)

// What IPVS has is read here and not by the library, which asks for the number of
// IPVS's netlink family once in the life of a process: it is another one after the
// module was unloaded and loaded again.

const (
	cmdGetService = 4
	cmdGetDest    = 8
	svcFirewall   = 5 // the mark that a virtual server is for
	destActive    = 7
	destInactive  = 8
)

// virtualServer is one of the kernel's. Its key is zero if it is for a mark, or of
// a protocol that is no Service's.
type virtualServer struct {
	key key
	settings
}

// realServer is one of a virtual server's.
type realServer struct {
	addr    netip.AddrPort
	weight  uint32
	forward uint32 // how packets get there
	busy    bool   // it has connections
}

// dump asks IPVS for a list and returns each element's attributes.
func (k *kernel) dump(cmd uint8, element uint16, body []byte) ([]map[uint16][]byte, error) {
	req := nl.NewNetlinkRequest(int(k.family), unix.NLM_F_DUMP)
	req.AddData(&nl.Genlmsg{Command: cmd, Version: genlVersion})
	req.AddRawData(body)
	msgs, err := req.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return nil, err
	}
	out := make([]map[uint16][]byte, 0, len(msgs))
	for _, m := range msgs {
		if list := attributes(m[min(len(m), nl.SizeofGenlmsg):])[element]; list != nil {
			out = append(out, attributes(list))
		}
	}
	return out, nil
}

func attributes(b []byte) map[uint16][]byte {
	out := map[uint16][]byte{}
	for a := range nl.ParseAttributes(b) {
		out[a.Type&nl.NLA_TYPE_MASK] = a.Value
	}
	return out
}

func number(b []byte) uint32 {
	switch len(b) {
	case 2:
		return uint32(binary.NativeEndian.Uint16(b))
	case 4, 8: // flags have a mask behind them
		return binary.NativeEndian.Uint32(b)
	}
	return 0
}

// endOf reads an address, of which IPv4 has the first four bytes, and a port.
func endOf(addr, port []byte, family uint32) netip.AddrPort {
	if family == unix.AF_INET && len(addr) > 4 {
		addr = addr[:4]
	}
	ip, ok := netip.AddrFromSlice(addr)
	if !ok || len(port) != 2 {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(ip, binary.BigEndian.Uint16(port))
}

// virtualServers reads all of them.
func (k *kernel) virtualServers() ([]virtualServer, error) {
	list, err := k.dump(cmdGetService, attrService, nil)
	if err != nil {
		return nil, fmt.Errorf("reading virtual servers: %w", err)
	}
	out := make([]virtualServer, 0, len(list))
	for _, a := range list {
		v := virtualServer{settings: settings{scheduler: nl.BytesToString(a[svcScheduler]), flags: number(a[svcFlags]) & flagsOurs}}
		if v.flags&flagPersistent != 0 {
			v.timeout = number(a[svcTimeout])
		}
		at := key{endOf(a[svcAddr], a[svcPort], number(a[svcFamily])), protoOf(uint16(number(a[svcProtocol])))} //nolint:gosec // 16 bits
		if a[svcFirewall] == nil && at.proto != 0 && at.addr.IsValid() {
			v.key = at
		}
		out = append(out, v)
	}
	return out, nil
}

// realServers reads those of a virtual server, none if it is gone.
func (k *kernel) realServers(at key) ([]realServer, error) {
	family := familyOf(at.addr.Addr())
	list, err := k.dump(cmdGetDest, attrDest, nlbatch.Nest(nil, attrService, func(b []byte) []byte {
		b = nlbatch.Uint16(b, svcFamily, family)
		b = nlbatch.Uint16(b, svcProtocol, uint16(at.proto))
		return portAttr(addrAttr(b, svcAddr, at.addr.Addr()), svcPort, at.addr.Port())
	}))
	if err != nil {
		return nil, fmt.Errorf("reading the real servers of %s: %w", at, err)
	}
	out := make([]realServer, 0, len(list))
	for _, a := range list {
		if f := number(a[destFamily]); f != 0 { // Linux 3.18
			family = uint16(f) //nolint:gosec // 16 bits
		}
		out = append(out, realServer{
			addr: endOf(a[destAddr], a[destPort], uint32(family)), weight: number(a[destWeight]),
			forward: number(a[destForward]) & forwardMask, busy: number(a[destActive])+number(a[destInactive]) > 0,
		})
	}
	return out, nil
}

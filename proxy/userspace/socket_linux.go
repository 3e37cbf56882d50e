package userspace

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// descriptorLimit is how many descriptors the process may have.
func descriptorLimit() int {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil || r.Cur > 1<<20 {
		return 1 << 20
	}
	return int(r.Cur)
}

// soOriginalDst is SO_ORIGINAL_DST (linux/netfilter_ipv4.h) and
// IP6T_SO_ORIGINAL_DST (linux/netfilter_ipv6/ip6_tables.h).
const soOriginalDst = 80

// originalDst asks the kernel for the address that a client dialled before our
// rules led the connection here.
func originalDst(c *net.TCPConn, six bool) (addr netip.AddrPort, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return addr, err
	}
	if cerr := raw.Control(func(fd uintptr) { addr, err = getOriginalDst(fd, six) }); cerr != nil {
		return addr, cerr
	}
	if err != nil {
		return addr, fmt.Errorf("SO_ORIGINAL_DST: %w", err)
	}
	return addr, nil
}

func getOriginalDst(fd uintptr, six bool) (netip.AddrPort, error) {
	if six {
		var sa unix.RawSockaddrInet6
		if err := getsockopt(fd, unix.SOL_IPV6, unsafe.Pointer(&sa), unsafe.Sizeof(sa)); err != nil {
			return netip.AddrPort{}, err
		}
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), networkOrder(sa.Port)), nil
	}
	var sa unix.RawSockaddrInet4
	if err := getsockopt(fd, unix.SOL_IP, unsafe.Pointer(&sa), unsafe.Sizeof(sa)); err != nil {
		return netip.AddrPort{}, err
	}
	return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), networkOrder(sa.Port)), nil
}

// networkOrder reads a port that stands in memory as it does on the wire.
func networkOrder(port uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], port)
	return binary.BigEndian.Uint16(b[:])
}

func getsockopt(fd uintptr, level int, to unsafe.Pointer, size uintptr) error {
	n := uint32(size)
	_, _, errno := syscall.Syscall6(syscall.SYS_GETSOCKOPT, fd, uintptr(level), soOriginalDst, uintptr(to), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

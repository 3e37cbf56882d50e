package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// SCTP sockets of the one-to-one style (RFC 6458) behave as TCP's do, so the
// net package carries them once they are made.

// listenSCTP listens on a port of all addresses.
func listenSCTP(port uint16) (net.Listener, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_SCTP)
	if err != nil {
		return nil, fmt.Errorf("this kernel has no SCTP sockets (try kptrace lab run --guest): %w", err)
	}
	f := os.NewFile(uintptr(fd), "sctp")
	defer f.Close()
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(port)}); err != nil {
		return nil, err
	}
	if err := unix.Listen(fd, 128); err != nil {
		return nil, err
	}
	return net.FileListener(f)
}

// dialSCTP connects from an address within a time. Local is known even if it
// fails. It holds a thread meanwhile.
func dialSCTP(from netip.Addr, to netip.AddrPort, wait time.Duration) (conn net.Conn, local netip.AddrPort, err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	if err != nil {
		return nil, local, fmt.Errorf("this kernel has no SCTP sockets: %w", err)
	}
	f := os.NewFile(uintptr(fd), "sctp")
	defer f.Close()
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: from.As4()}); err != nil {
		return nil, local, err
	}
	if sa, err := unix.Getsockname(fd); err == nil {
		if sa4, ok := sa.(*unix.SockaddrInet4); ok {
			local = netip.AddrPortFrom(from, uint16(sa4.Port))
		}
	}
	tv := unix.NsecToTimeval(wait.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
		return nil, local, err
	}
	err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINPROGRESS) {
		err = unix.ETIMEDOUT
	}
	if err != nil {
		return nil, local, os.NewSyscallError("connect", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, local, err
	}
	conn, err = net.FileConn(f)
	return conn, local, err
}

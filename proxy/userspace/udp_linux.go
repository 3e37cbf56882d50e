package userspace

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// udpReceiveBuffer is what a port's socket holds while nobody reads it.
const udpReceiveBuffer = 1 << 20

// listenUDP opens a socket that tells at which address a datagram arrived, so
// that the answer leaves from there, and how many were dropped.
func listenUDP(network string, at netip.AddrPort) (*udpServer, error) {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		if cerr := raw.Control(func(fd uintptr) {
			if at.Addr().Is6() {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
			} else {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
			}
			if err == nil {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1)
			}
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, udpReceiveBuffer)
		}); cerr != nil {
			return cerr
		}
		return err
	}}
	c, err := lc.ListenPacket(context.Background(), network, at.String())
	if err != nil {
		return nil, err
	}
	conn, ok := c.(*net.UDPConn)
	if !ok {
		return nil, fmt.Errorf("%T is no UDP socket", c)
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return &udpServer{conn: conn, raw: raw, sessions: make(map[sessionKey]*session)}, nil
}

// next waits for a datagram of a client and reads it into a buffer, which the
// caller gives back.
func (u *udpServer) next() (d datagram, buf *[maxDatagram]byte, err error) {
	oob := make([]byte, 128)
	pool := &u.l.b.datagrams
	rerr := u.raw.Read(func(fd uintptr) bool {
		buf = pool.get()
		for {
			var oobn int
			var from unix.Sockaddr
			d.n, oobn, _, from, err = unix.Recvmsg(int(fd), buf[:], oob, unix.MSG_DONTWAIT)
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case errors.Is(err, unix.EAGAIN):
				pool.put(buf)
				return false
			case err == nil:
				err = d.read(from, oob[:oobn])
			}
			return true
		}
	})
	if rerr != nil {
		return d, nil, rerr
	}
	if err != nil {
		pool.put(buf)
		return d, nil, err
	}
	return d, buf, nil
}

// read fills in where a datagram came from and arrived.
func (d *datagram) read(from unix.Sockaddr, oob []byte) error {
	switch sa := from.(type) {
	case *unix.SockaddrInet4:
		d.client = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		d.client = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	default:
		return fmt.Errorf("a datagram from %T", from)
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return err
	}
	for i := range messages {
		m := &messages[i]
		switch {
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo:
			d.local = netip.AddrFrom4([4]byte(m.Data[8:12])) // ipi_addr
		case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= unix.SizeofInet6Pktinfo:
			d.local = netip.AddrFrom16([16]byte(m.Data[:16]))
		case m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SO_RXQ_OVFL && len(m.Data) >= 4:
			d.lost = binary.NativeEndian.Uint32(m.Data)
		}
	}
	if !d.local.IsValid() {
		return errors.New("a datagram without its address of arrival")
	}
	return nil
}

// send sends an answer to a client from the address at which it asked.
func (u *udpServer) send(payload []byte, client netip.AddrPort, from netip.Addr) error {
	var oob []byte
	if from.Is4() {
		oob = unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: from.As4()})
	} else {
		oob = unix.PktInfo6(&unix.Inet6Pktinfo{Addr: from.As16()})
	}
	_, _, err := u.conn.WriteMsgUDPAddrPort(payload, oob, client)
	return err
}

// next waits for an answer of the endpoint and reads it into a buffer, which the
// caller gives back.
func (s *session) next() (n int, buf *[maxDatagram]byte, err error) {
	pool := &s.u.l.b.datagrams
	rerr := s.raw.Read(func(fd uintptr) bool {
		buf = pool.get()
		for {
			n, err = unix.Read(int(fd), buf[:])
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case errors.Is(err, unix.EAGAIN):
				pool.put(buf)
				return false
			}
			return true
		}
	})
	if rerr != nil {
		return 0, nil, rerr
	}
	if err != nil {
		pool.put(buf)
		return 0, nil, err
	}
	return n, buf, nil
}

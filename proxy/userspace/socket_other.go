//go:build !linux

package userspace

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
)

var errLinux = errors.New("proxy/userspace: serving needs Linux")

func descriptorLimit() int { return 1024 }

func originalDst(*net.TCPConn, bool) (netip.AddrPort, error) { return netip.AddrPort{}, errLinux }

// pipePool has no pipes here.
type pipePool struct{ max int }

func (p *pipePool) close() {}

func (p *pipePool) carry(dst, src *net.TCPConn) (uint64, bool, error) {
	return copyBuffered(dst, src, make([]byte, 32<<10))
}

// copyBuffered carries src to dst by way of a buffer.
func copyBuffered(dst, src *net.TCPConn, buf []byte) (n uint64, atSrc bool, err error) {
	for {
		m, err := src.Read(buf)
		if m > 0 {
			w, werr := dst.Write(buf[:m])
			n += uint64(w)
			if werr != nil {
				return n, false, werr
			}
		}
		switch {
		case err == io.EOF:
			return n, true, nil
		case err != nil && !errors.Is(err, syscall.EINTR):
			return n, true, err
		}
	}
}

func listenUDP(string, netip.AddrPort) (*udpServer, error) { return nil, errLinux }

func (u *udpServer) next() (datagram, *[maxDatagram]byte, error) { return datagram{}, nil, errLinux }

func (u *udpServer) send([]byte, netip.AddrPort, netip.Addr) error { return errLinux }

func (s *session) next() (int, *[maxDatagram]byte, error) { return 0, nil, errLinux }

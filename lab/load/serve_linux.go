package load

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"

	"golang.org/x/sys/unix"
)

// Serve answers at an IPv4 address and port, in the calling thread's network
// namespace, until ctx ends, which is no error. ready is called once it
// listens. What it answers is that address and port.
func Serve(ctx context.Context, at netip.AddrPort, ready func()) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	s, err := listen(at)
	if err != nil {
		return fmt.Errorf("load: listening at %s: %w", at, err)
	}
	defer s.close()
	ready()
	events := make([]unix.EpollEvent, 256)
	for ctx.Err() == nil {
		n, err := unix.EpollWait(s.epoll, events, 100)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("load: waiting: %w", err)
		}
		for i := range max(n, 0) {
			if fd := int(events[i].Fd); fd == s.listener {
				s.accept()
			} else {
				s.answer(fd)
			}
		}
	}
	return nil
}

type server struct {
	epoll, listener int
	open            map[int]bool
	buf, response   []byte
}

func listen(at netip.AddrPort) (*server, error) {
	if !at.Addr().Is4() {
		return nil, errors.New("not an IPv4 address")
	}
	s := &server{open: map[int]bool{}, buf: make([]byte, 4096), epoll: -1, listener: -1}
	s.response = fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s\n", len(at.String())+1, at)
	var err error
	if s.listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, err
	}
	if s.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err == nil {
		err = unix.SetsockoptInt(s.listener, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err == nil {
		err = unix.Bind(s.listener, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()})
	}
	if err == nil {
		err = unix.Listen(s.listener, 4096)
	}
	if err == nil {
		err = s.watch(s.listener, unix.EPOLLIN)
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *server) close() {
	for fd := range s.open {
		unix.Close(fd)
	}
	unix.Close(s.listener)
	if s.epoll >= 0 {
		unix.Close(s.epoll)
	}
}

func (s *server) watch(fd int, events uint32) error {
	return unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Fd: int32(fd), Events: events})
}

func (s *server) accept() {
	for range 64 {
		fd, _, err := unix.Accept4(s.listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if err != nil {
			return // nobody waits, or whoever did has gone
		}
		if s.watch(fd, unix.EPOLLIN|unix.EPOLLRDHUP) != nil {
			unix.Close(fd)
			continue
		}
		s.open[fd] = true
	}
}

// answer answers whatever was asked, and hangs up.
func (s *server) answer(fd int) {
	n, err := unix.Read(fd, s.buf)
	if errors.Is(err, unix.EAGAIN) {
		return
	}
	if err == nil && n > 0 {
		_, _ = unix.Write(fd, s.response)
	}
	delete(s.open, fd)
	unix.Close(fd)
}

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// patience is how long either end waits for the other once connected.
const patience = 5 * time.Second

// largeAnswer is more than fits in a few packets.
const largeAnswer = 32 << 10

// server answers on a pod's ports with the pod's name and the address that
// the client seems to have.
type server struct {
	id    string
	ports []Port
	delay atomic.Int64 // nanoseconds before each answer
	reset atomic.Bool  // instead of an answer
	large atomic.Bool  // an answer of largeAnswer bytes

	mu   sync.Mutex
	open []io.Closer
}

// listen opens all ports, or none.
func (s *server) listen(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.open) > 0 {
		return nil
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // plain TCP is what is being shown
	for _, p := range s.ports {
		at := fmt.Sprintf(":%d", p.Number)
		var c io.Closer
		var err error
		switch p.Scheme {
		case "sctp", "http", "tcp":
			var l net.Listener
			if p.Scheme == "sctp" {
				l, err = listenSCTP(p.Number)
			} else {
				l, err = lc.Listen(ctx, "tcp4", at)
			}
			if err == nil {
				go s.serveTCP(l, p.Scheme == "http")
				c = l
			}
		default:
			var conn net.PacketConn
			if conn, err = lc.ListenPacket(ctx, "udp4", at); err == nil {
				go s.serveUDP(conn)
				c = conn
			}
		}
		if err != nil {
			s.closeLocked()
			return fmt.Errorf("lab: listening: %w", err)
		}
		s.open = append(s.open, c)
	}
	return nil
}

// refuse closes all ports: the kernel answers with RST and ICMP from now on.
func (s *server) refuse() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closeLocked()
}

func (s *server) closeLocked() {
	for _, c := range s.open {
		c.Close()
	}
	s.open = nil
}

func (s *server) answer(client net.Addr) []byte {
	return fmt.Appendf(nil, "%s %s\n", s.id, client)
}

func (s *server) serveTCP(l net.Listener, http bool) {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors, perhaps
			continue
		}
		go s.serveConn(conn, http)
	}
}

func (s *server) serveConn(conn net.Conn, http bool) {
	defer conn.Close()
	d := time.Duration(s.delay.Load())
	_ = conn.SetDeadline(time.Now().Add(patience + d))
	body := s.answer(conn.RemoteAddr())
	if s.large.Load() {
		body = append(body, bytes.Repeat([]byte{'\n'}, largeAnswer-len(body))...)
	}
	if http {
		if err := readHead(conn); err != nil {
			return
		}
		body = fmt.Appendf(nil, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
	}
	time.Sleep(d)
	if t, ok := conn.(*net.TCPConn); ok && s.reset.Load() {
		_ = t.SetLinger(0) // closing it now sends an RST
		return
	}
	if _, err := conn.Write(body); err != nil {
		return
	}
	// End in good order: all said, then wait until the client has no more to
	// say, or its last words would be answered by an RST.
	if half, ok := conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		_, _ = io.Copy(io.Discard, conn)
	}
}

// readHead reads the head of an HTTP request, of at most 8 KiB.
func readHead(r io.Reader) error {
	buf := make([]byte, 8192)
	for n := 0; n < len(buf); {
		m, err := r.Read(buf[n:])
		n += m
		if bytes.Contains(buf[:n], []byte("\r\n\r\n")) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return errors.New("lab: request too large")
}

func (s *server) serveUDP(conn net.PacketConn) {
	buf := make([]byte, 2048)
	for {
		_, from, err := conn.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		d := time.Duration(s.delay.Load())
		if d == 0 {
			_, _ = conn.WriteTo(s.answer(from), from)
			continue
		}
		time.AfterFunc(d, func() { _, _ = conn.WriteTo(s.answer(from), from) })
	}
}

// parseAnswer reads what a server says of itself and its client.
func parseAnswer(body []byte) (server string, seen netip.AddrPort, err error) {
	name, addr, ok := bytes.Cut(bytes.TrimSpace(body), []byte(" "))
	if ok {
		seen, err = netip.ParseAddrPort(string(addr))
	}
	if !ok || err != nil {
		return "", seen, fmt.Errorf("lab: answer %.60q is not \"namespace/pod address\"", body)
	}
	return string(name), seen, nil
}

package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/conntrack"
)

const (
	// connectPatience leaves room for two retransmitted SYNs.
	connectPatience = 2500 * time.Millisecond
	udpPatience     = 1500 * time.Millisecond
)

// client makes a pod's connections and reports each that has ended.
type client struct {
	id     string
	addr   netip.Addr
	abort  *atomic.Bool // reset connections after asking; nil is never
	report func(*Report)

	wg sync.WaitGroup
}

// run makes connections to all targets until ctx ends, and waits for those
// under way.
func (c *client) run(ctx context.Context, targets []Target) {
	for _, t := range targets {
		c.wg.Go(func() { c.pace(ctx, t) })
	}
	c.wg.Wait()
}

// pace starts connections at the target's rate. What is late is caught up
// with, but never more than a second's worth.
func (c *client) pace(ctx context.Context, t Target) {
	interval := time.Duration(float64(time.Second) / t.Rate)
	room := make(chan struct{}, t.Concurrency)
	next := time.Now().Add(t.After + rand.N(interval+1)) // not all clients at once
	timer := time.NewTimer(time.Until(next))
	defer timer.Stop()
	for made := 0; t.Count == 0 || made < t.Count; {
		timer.Reset(time.Until(next))
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		if late := time.Since(next); late > time.Second {
			next = next.Add(late - time.Second)
		}
		next = next.Add(interval)
		select {
		case room <- struct{}{}:
			made++
			c.wg.Go(func() {
				r := c.connect(t)
				c.report(&r)
				<-room
			})
		default:
		}
	}
}

// connect makes one connection from a fresh port and ends it. It is not
// hurried by anybody's context: what was begun is seen through.
func (c *client) connect(t Target) Report {
	r := Report{Client: c.id, URL: t.URL, Proto: conntrack.TCP, Remote: t.Addr, Established: -1}
	network, wait := "tcp4", connectPatience
	if t.Scheme == "udp" {
		r.Proto, network, wait = conntrack.UDP, "udp4", udpPatience
	}
	if t.Scheme == "sctp" {
		r.Proto = conntrack.SCTP
	}
	d := net.Dialer{KeepAlive: -1, Timeout: wait, Control: func(_, _ string, rc syscall.RawConn) error {
		return c.bind(rc, &r)
	}}
	r.Start = time.Now()
	var conn net.Conn
	var err error
	if r.Proto == conntrack.SCTP {
		conn, r.Local, err = dialSCTP(c.addr, t.Addr, wait)
	} else {
		conn, err = d.Dial(network, t.Addr.String())
	}
	if err == nil {
		if r.Proto != conntrack.UDP {
			r.Established = time.Since(r.Start)
			time.Sleep(t.Hold)
			_ = conn.SetDeadline(time.Now().Add(patience))
		} else {
			_ = conn.SetDeadline(r.Start.Add(wait + t.Hold))
		}
		err = c.exchange(conn, t, &r)
		conn.Close()
	}
	r.End = time.Now()
	r.Err = failure(err)
	return r
}

// bind gives the socket its port before it connects, so that the port is
// known even of a connection that fails.
func (c *client) bind(rc syscall.RawConn, r *Report) error {
	var err error
	if e := rc.Control(func(fd uintptr) {
		err = unix.Bind(int(fd), &unix.SockaddrInet4{Addr: c.addr.As4()})
		if err != nil {
			return
		}
		var sa unix.Sockaddr
		if sa, err = unix.Getsockname(int(fd)); err == nil {
			if sa4, ok := sa.(*unix.SockaddrInet4); ok {
				r.Local = netip.AddrPortFrom(c.addr, uint16(sa4.Port))
			}
		}
	}); e != nil {
		return e
	}
	return err
}

// exchange asks the server for its name.
func (c *client) exchange(conn net.Conn, t Target, r *Report) error {
	var body []byte
	var err error
	switch t.Scheme {
	case "http":
		if c.abort != nil && c.abort.Load() {
			return abort(conn, t.Addr.String())
		}
		body, err = httpGet(conn, t.Addr.String(), "/")
	case "tcp", "sctp":
		body, err = io.ReadAll(io.LimitReader(conn, 1024))
	case "udp":
		body = make([]byte, 1024)
		if _, err = conn.Write([]byte(c.id)); err == nil {
			var n int
			if n, err = conn.Read(body); err == nil {
				r.Established = time.Since(r.Start)
			}
			body = body[:n]
			c.again(conn, t)
		}
	}
	if err != nil {
		return err
	}
	r.Server, r.Seen, err = parseAnswer(body)
	return err
}

// udpAgain is how often a client that holds its UDP port asks once more.
const udpAgain = 250 * time.Millisecond

// again asks from the same port for as long as a UDP target is held, answered or not.
func (c *client) again(conn net.Conn, t Target) {
	for end := time.Now().Add(t.Hold); time.Now().Before(end); time.Sleep(udpAgain) {
		_, _ = conn.Write([]byte(c.id))
	}
}

// abort asks and has the kernel send an RST instead of waiting for the answer.
func abort(conn net.Conn, host string) error {
	t, ok := conn.(*net.TCPConn)
	if !ok {
		return nil
	}
	if _, err := fmt.Fprintf(t, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host); err != nil {
		return err
	}
	return t.SetLinger(0) // closing it now sends an RST
}

// httpGet asks for a path and returns the body of the answer.
func httpGet(conn net.Conn, host, path string) ([]byte, error) {
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: kptrace-lab\r\nConnection: close\r\n\r\n", path, host); err != nil {
		return nil, err
	}
	all, err := io.ReadAll(io.LimitReader(conn, 1<<16))
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, errors.New("lab: closed without an answer")
	}
	_, body, ok := bytes.Cut(all, []byte("\r\n\r\n"))
	if !ok || !bytes.HasPrefix(all, []byte("HTTP/1.1 200 ")) {
		return nil, fmt.Errorf("lab: answer is not 200 OK: %.60q", all)
	}
	return body, nil
}

// failure names an error by what a user would call it.
func failure(err error) string {
	switch {
	case err == nil:
		return ""
	case errors.Is(err, unix.ECONNREFUSED):
		return FailRefused
	case errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return FailReset
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
		return FailUnreachable
	case errors.Is(err, unix.ETIMEDOUT), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return FailTimeout
	}
	return err.Error()
}

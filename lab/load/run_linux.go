package load

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

const request = "GET / HTTP/1.1\r\nHost: load\r\nConnection: close\r\n\r\n"

// conn is one connection under way.
type conn struct {
	fd      int
	began   time.Time
	sent    bool
	answers int // bytes
	told    Conn
}

type client struct {
	cfg    Config
	epoll  int
	target unix.SockaddrInet4
	open   map[int32]*conn
	spare  []*conn
	began  int
	result Result
	took   []time.Duration
	buf    []byte
}

// Run makes connections from the calling thread's network namespace until the
// Config's limit or the end of ctx, which is no error.
func Run(ctx context.Context, cfg Config) (Result, error) {
	if err := cfg.defaults(); err != nil {
		return Result{}, err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return Result{}, fmt.Errorf("load: making an epoll: %w", err)
	}
	defer unix.Close(epoll)
	c := client{cfg: cfg, epoll: epoll, open: map[int32]*conn{}, buf: make([]byte, 4096),
		result: Result{Errors: map[string]int{}}}
	c.target = unix.SockaddrInet4{Port: int(cfg.Target.Port()), Addr: cfg.Target.Addr().As4()}
	start := time.Now()
	err = c.loop(ctx, start)
	for _, k := range c.open {
		unix.Close(k.fd)
	}
	c.result.finish(c.took, time.Since(start))
	return c.result, err
}

func (c *client) loop(ctx context.Context, start time.Time) error {
	events := make([]unix.EpollEvent, 256)
	swept := start
	for {
		now := time.Now()
		over := ctx.Err() != nil || c.cfg.Conns > 0 && c.began >= c.cfg.Conns ||
			c.cfg.Duration > 0 && now.Sub(start) >= c.cfg.Duration
		if over && len(c.open) == 0 {
			return nil
		}
		wait := 100
		if !over {
			if c.begin(now, now.Sub(start)) {
				wait = 1
			}
		}
		n, err := unix.EpollWait(c.epoll, events, wait)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("load: waiting: %w", err)
		}
		for i := range max(n, 0) {
			if k := c.open[events[i].Fd]; k != nil {
				c.advance(k, events[i].Events)
			}
		}
		if now.Sub(swept) > 100*time.Millisecond {
			swept = now
			for _, k := range c.open {
				if now.Sub(k.began) > c.cfg.Patience {
					c.end(k, unix.ETIMEDOUT)
				}
			}
		}
	}
}

// begin opens as many connections as there is room for; it returns whether
// more are due at once.
func (c *client) begin(now time.Time, since time.Duration) bool {
	for len(c.open) < c.cfg.Concurrency {
		if c.cfg.Conns > 0 && c.began >= c.cfg.Conns {
			return false
		}
		if c.cfg.Rate > 0 && float64(c.began) >= c.cfg.Rate*since.Seconds() {
			return true
		}
		c.began++
		if err := c.connect(now); err != nil {
			c.result.Errors[err.Error()]++
			if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EMFILE) {
				return true // out of ports or descriptors: wait for some
			}
		}
	}
	return false
}

func (c *client) connect(now time.Time) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, &c.target); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		return err
	}
	// Edge-triggered: one registration lasts for the connection's life.
	ev := unix.EpollEvent{Fd: int32(fd), Events: unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET}
	if err := unix.EpollCtl(c.epoll, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		unix.Close(fd)
		return err
	}
	var k *conn
	if n := len(c.spare); n > 0 {
		k, c.spare = c.spare[n-1], c.spare[:n-1]
	} else {
		k = new(conn)
	}
	*k = conn{fd: fd, began: now}
	c.open[int32(fd)] = k
	return nil
}

func (c *client) advance(k *conn, events uint32) {
	if events&unix.EPOLLERR != 0 {
		errno, err := unix.GetsockoptInt(k.fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && errno != 0 {
			c.end(k, unix.Errno(errno))
			return
		}
	}
	if !k.sent && events&unix.EPOLLOUT != 0 {
		if _, err := unix.Write(k.fd, []byte(request)); err != nil {
			c.end(k, err)
			return
		}
		k.sent = true
	}
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP) == 0 {
		return
	}
	for {
		n, err := unix.Read(k.fd, c.buf)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return
		case err != nil:
			c.end(k, err)
			return
		case n == 0:
			c.end(k, nil)
			return
		}
		if k.answers == 0 && c.cfg.Each != nil {
			k.told = told(k, c.buf[:n])
		}
		k.answers += n
		if n < len(c.buf) && events&unix.EPOLLRDHUP == 0 {
			return // no more yet: the end will wake us
		}
	}
}

func (c *client) end(k *conn, err error) {
	unix.Close(k.fd)
	delete(c.open, int32(k.fd))
	c.spare = append(c.spare, k)
	switch {
	case err != nil:
		c.result.Errors[err.Error()]++
	case k.answers == 0:
		c.result.Errors["closed without an answer"]++
	default:
		c.result.Done++
		c.took = append(c.took, time.Since(k.began))
		if c.cfg.Each != nil {
			c.cfg.Each(k.told)
		}
	}
}

// told reads who answered; what cannot be read stays zero.
func told(k *conn, answer []byte) Conn {
	t := Conn{Began: k.began}
	if sa, err := unix.Getsockname(k.fd); err == nil {
		if in, ok := sa.(*unix.SockaddrInet4); ok {
			t.Local = netip.AddrPortFrom(netip.AddrFrom4(in.Addr), uint16(in.Port))
		}
	}
	if i := bytes.LastIndex(answer, []byte("\r\n\r\n")); i >= 0 {
		if at, err := netip.ParseAddrPort(string(bytes.TrimSpace(answer[i:]))); err == nil {
			t.Server = at
		}
	}
	return t
}

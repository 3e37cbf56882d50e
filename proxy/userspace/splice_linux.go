package userspace

import (
	"cmp"
	"errors"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// pipeBytes is what one splice moves at most, and what a pipe is asked to hold.
// An ordinary user may be refused, and has 64 KiB then, or two pages where the
// user's pipes hold much together (pipe(7)).
const pipeBytes = 256 << 10

// pipePool keeps the pipes through which splice(2) moves bytes from socket to
// socket. A direction has one only while there are bytes in it, so idle
// connections need none, and a splice that finds nothing to do has met an empty
// socket, never a full pipe. The zero value with a max is ready.
type pipePool struct {
	max int // pipes in existence at once
	// size is what a pipe is asked to hold; zero means pipeBytes.
	size int

	mu   sync.Mutex
	free []*pipe
	made int
}

type pipe struct{ r, w int }

// get returns an empty pipe, nil where there may be no more or the kernel has
// none.
func (p *pipePool) get() *pipe {
	p.mu.Lock()
	if n := len(p.free); n > 0 {
		x := p.free[n-1]
		p.free = p.free[:n-1]
		p.mu.Unlock()
		return x
	}
	if p.made >= p.max {
		p.mu.Unlock()
		return nil
	}
	p.made++
	p.mu.Unlock()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		p.mu.Lock()
		p.made--
		p.mu.Unlock()
		return nil
	}
	_, _ = unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, cmp.Or(p.size, pipeBytes))
	return &pipe{fds[0], fds[1]}
}

// keepPipes are kept for the next burst; more are closed.
const keepPipes = 64

// put takes a pipe back. One with bytes left in it is of no more use.
func (p *pipePool) put(x *pipe, empty bool) {
	p.mu.Lock()
	if empty && len(p.free) < keepPipes {
		p.free = append(p.free, x)
		p.mu.Unlock()
		return
	}
	p.made--
	p.mu.Unlock()
	x.close()
}

func (x *pipe) close() {
	_ = unix.Close(x.r)
	_ = unix.Close(x.w)
}

func (p *pipePool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, x := range p.free {
		x.close()
	}
	p.made -= len(p.free)
	p.free = nil
}

// carrier moves one direction.
type carrier struct {
	pool   *pipePool
	pipe   *pipe
	buf    []byte // where there is no pipe
	n      int    // bytes in pipe, or in buf
	off    int    // of them written, for buf
	err    error
	fill   func(fd uintptr) bool
	drain  func(fd uintptr) bool
	carted uint64
}

// carry moves src to dst until the end of src, or an error; atSrc says on which
// side that was.
func (p *pipePool) carry(dst, src *net.TCPConn) (n uint64, atSrc bool, err error) {
	from, err := src.SyscallConn()
	if err != nil {
		return 0, true, err
	}
	to, err := dst.SyscallConn()
	if err != nil {
		return 0, false, err
	}
	c := &carrier{pool: p}
	c.fill, c.drain = c.fillFrom, c.drainTo
	defer func() { c.release(c.n == 0) }()
	for {
		if err := from.Read(c.fill); err != nil {
			return c.carted, true, err
		}
		switch {
		case c.err != nil:
			return c.carted, true, c.err
		case c.n == 0:
			return c.carted, true, nil
		}
		if err := to.Write(c.drain); err != nil {
			return c.carted, false, err
		}
		if c.err != nil {
			return c.carted, false, c.err
		}
		c.release(true)
	}
}

// release gives pipe and buffer back.
func (c *carrier) release(empty bool) {
	if c.pipe != nil {
		c.pool.put(c.pipe, empty)
		c.pipe = nil
	}
	c.buf = nil
}

// fillFrom takes bytes from a socket, and reports false to wait for some.
func (c *carrier) fillFrom(fd uintptr) bool {
	if c.pipe == nil {
		c.pipe = c.pool.get()
	}
	for {
		var n int64
		var err error
		if c.pipe != nil {
			n, err = unix.Splice(int(fd), nil, c.pipe.w, nil, pipeBytes, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		} else {
			if c.buf == nil {
				c.buf = make([]byte, 4<<10)
			}
			var m int
			m, err = unix.Read(int(fd), c.buf)
			n = int64(m)
		}
		switch {
		case err == nil:
			c.n, c.off, c.err = int(n), 0, nil
			return true
		case errors.Is(err, syscall.EINTR):
			continue
		case errors.Is(err, syscall.EAGAIN):
			c.release(true)
			return false
		}
		c.n, c.err = 0, err
		return true
	}
}

// drainTo gives the bytes to a socket, and reports false to wait for room.
func (c *carrier) drainTo(fd uintptr) bool {
	for c.n > 0 {
		var n int64
		var err error
		if c.pipe != nil {
			n, err = unix.Splice(c.pipe.r, nil, int(fd), nil, c.n, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		} else {
			var m int
			m, err = unix.Write(int(fd), c.buf[c.off:c.off+c.n])
			n = int64(m)
		}
		switch {
		case err == nil:
			c.n -= int(n)
			c.off += int(n)
			c.carted += uint64(n)
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.EAGAIN):
			return false
		default:
			c.err = err
			return true
		}
	}
	c.err = nil
	return true
}

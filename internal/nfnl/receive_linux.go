package nfnl

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxDatagram is more than the kernel ever puts into one: NFLOG batches
	// up to 128 KiB (NFULNL_CFG nlbufsiz), everything else at most a page.
	maxDatagram = 160 << 10
	// bufferLen holds a few of them, and thousands of conntrack events.
	bufferLen = 512 << 10
	// idleEvery is how often Handler.Idle is called.
	idleEvery = time.Second
	// quietTicks is how many ticks without a message it takes until Receive
	// sleeps in the kernel. Before that it only looks each tick: a thread that
	// goes to sleep in a system call hundreds of times a second keeps the Go
	// runtime's monitor awake, which costs more than all of the reading.
	quietTicks = 10
	// busyBytes in one drain make the next wait busyTicks long: a reader on a
	// saturated machine takes time from those it watches each time it wakes.
	busyBytes = 32 << 10
	busyTicks = 3
)

// DefaultTick is how long Receive lets messages gather: long enough that
// wakeups cost nothing, short enough that nobody sees it.
const DefaultTick = 5 * time.Millisecond

// Handler takes what Receive reads. Its functions are called one at a time;
// times are our wall clock in nanoseconds since 1970.
type Handler struct {
	// Tick is how long messages gather once the first has come, three times as
	// long where very many do; zero means DefaultTick.
	Tick time.Duration
	// Data takes the datagrams of one drain, one behind the other, read just
	// before now. They are valid until it returns.
	Data func(data []byte, now int64)
	// Overrun is called when the socket reports ENOBUFS: the kernel had to
	// drop something since the last time.
	Overrun func(now int64)
	// Idle is called about once a second, whether or not there is traffic.
	Idle func(now int64)
}

// Receive reads until ctx ends, which is no error. It sleeps until the socket
// is readable, lets messages gather for a tick, and drains the socket without
// ever blocking on a single message. It does not allocate once it runs.
func (s *Socket) Receive(ctx context.Context, h Handler) error {
	if len(s.early) > 0 {
		h.Data(s.early, time.Now().UnixNano())
		s.early = nil
	}
	return ReceiveFrom(ctx, s.fd, h)
}

// ReceiveFrom is Receive for a socket that somebody else opened, such as a
// library, and that does not block.
func ReceiveFrom(ctx context.Context, fd int, h Handler) error {
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("nfnl: making an eventfd: %w", err)
	}
	defer unix.Close(stop)
	written := make(chan struct{})
	unregister := context.AfterFunc(ctx, func() {
		defer close(written)
		_, _ = unix.Write(stop, []byte{1, 1, 1, 1, 1, 1, 1, 1})
	})
	defer func() {
		if !unregister() {
			<-written
		}
	}()

	if h.Tick == 0 {
		h.Tick = DefaultTick
	}
	l := &loop{Handler: h, fd: fd, stop: stop, buf: make([]byte, bufferLen)}
	return l.run(ctx)
}

type loop struct {
	Handler
	fd, stop int
	buf      []byte
	fds      [2]unix.PollFd
	idle     time.Time
}

func (l *loop) run(ctx context.Context) error {
	quiet, wait := quietTicks, l.Tick
	for l.idle = time.Now(); ctx.Err() == nil; {
		readable := true
		if quiet >= quietTicks {
			var err error
			if readable, err = l.wait(idleEvery); err != nil {
				return err
			}
		}
		if readable {
			time.Sleep(wait)
			got, err := l.drain(ctx)
			if err != nil {
				return err
			}
			if quiet++; got > 0 {
				quiet = 0
			}
			if wait = l.Tick; got >= busyBytes {
				wait *= busyTicks
			}
		}
		if now := time.Now(); now.Sub(l.idle) >= idleEvery {
			l.idle = now
			if l.Idle != nil {
				l.Idle(now.UnixNano())
			}
		}
	}
	return nil
}

// wait returns when the socket is readable, after d, or when the context has
// ended.
func (l *loop) wait(d time.Duration) (readable bool, err error) {
	l.fds[0] = unix.PollFd{Fd: int32(l.stop), Events: unix.POLLIN}
	l.fds[1] = unix.PollFd{Fd: int32(l.fd), Events: unix.POLLIN}
	timeout := unix.NsecToTimespec(int64(d))
	_, err = unix.Ppoll(l.fds[:], &timeout, nil)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return false, fmt.Errorf("nfnl: waiting for messages: %w", err)
	}
	return err == nil && l.fds[1].Revents != 0, nil
}

// drain reads until there is nothing left, and hands over full buffers. It
// returns how many bytes there were.
func (l *loop) drain(ctx context.Context) (got int, err error) {
	n := 0
	for {
		size, err := unix.Read(l.fd, l.buf[n:])
		switch {
		case err == nil && size > 0:
			got += size
			n += align(size)
		case errors.Is(err, unix.EAGAIN), err == nil:
			if n > 0 {
				l.Data(l.buf[:n], time.Now().UnixNano())
			}
			return got, nil
		case errors.Is(err, unix.ENOBUFS):
			got += busyBytes
			if l.Overrun != nil {
				l.Overrun(time.Now().UnixNano())
			}
		case errors.Is(err, unix.EINTR):
		default:
			return got, fmt.Errorf("nfnl: reading messages: %w", err)
		}
		if len(l.buf)-n < maxDatagram {
			l.Data(l.buf[:n], time.Now().UnixNano())
			n = 0
			if ctx.Err() != nil {
				return got, nil
			}
		}
	}
}

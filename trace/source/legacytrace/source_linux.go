package legacytrace

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	gonflog "github.com/florianl/go-nflog/v2"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/trace"
)

// group is where TRACE reports.
const group = 0

// How long reports gather: a packet's come within microseconds. A small buffer is
// full before that; there each wait has to be as short as can be.
const (
	tick      = 2 * time.Millisecond
	shortTick = 50 * time.Microsecond
	small     = 8 << 20
)

// lookEvery is how often the kernel is asked what it dropped.
const lookEvery = 200 * time.Millisecond

// Run reads the traces of the calling thread's network namespace until ctx
// ends, and what the kernel sent until then. It calls ready when the group is
// bound and read. The sysctl that sends traces there is the caller's. It needs
// CAP_NET_ADMIN in the namespace and any kernel with nfnetlink_log.
//
// go-nflog opens, binds and configures the socket. What arrives is read from that
// socket as other sources read theirs: the library takes 15 µs for a report, and
// the kernel makes one in 2.
func (s *Source) Run(ctx context.Context, ready func(), emit func(trace.Frame)) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	nf, err := gonflog.Open(&gonflog.Config{
		Group: group, Copymode: gonflog.CopyPacket, Bufsize: s.config.CopyRange, Flags: gonflog.FlagSeq,
	})
	if err != nil {
		return fmt.Errorf("legacytrace: opening group %d: %w", group, err)
	}
	err = s.run(ctx, nf, ready, emit)
	if closeErr := nf.Close(); err == nil && closeErr != nil {
		err = fmt.Errorf("legacytrace: closing group %d: %w", group, closeErr)
	}
	return err
}

func (s *Source) run(ctx context.Context, nf *gonflog.Nflog, ready func(), emit func(trace.Frame)) error {
	if err := s.buffer(nf); err != nil {
		return err
	}
	port, err := portID(nf)
	if err != nil {
		return err
	}
	library, stop := context.WithCancel(context.Background())
	defer stop()
	ended := make(chan error, 1)
	early := func(gonflog.Attribute) int {
		now := time.Now().UnixNano()
		s.tally.Lose(now, now, 1, "before reading began")
		return 0
	}
	// The library reads in the background until its wait is interrupted, and asks
	// then what to do: that is where we read in its place.
	interrupted := func(err error) int {
		switch {
		case errors.Is(err, unix.ENOBUFS):
			s.tally.Overrun()
			return 0
		case errors.Is(err, unix.EINTR):
			return 0
		case errors.Is(err, os.ErrDeadlineExceeded):
			err = s.read(ctx, nf, ready, emit)
		}
		ended <- err
		return 1
	}
	if err := nf.RegisterWithErrorFunc(library, early, interrupted); err != nil {
		return fmt.Errorf("legacytrace: binding group %d, which one program at a time can have: %w", group, err)
	}
	if err := nf.Con.SetReadDeadline(time.Unix(1, 0)); err != nil {
		return fmt.Errorf("legacytrace: taking over the socket: %w", err)
	}
	return s.watch(ended, &nfnl.Drops{
		Count: func() (uint32, error) { return nfnl.DropsOf(port) },
		Since: time.Now().UnixNano(),
		Report: func(from, to int64, n uint64) {
			s.tally.Lose(from, to, n, "kernel") // each is a datagram of its own
		},
	})
}

// read reads the socket until ctx ends.
func (s *Source) read(ctx context.Context, nf *gonflog.Nflog, ready func(), emit func(trace.Frame)) error {
	data := func(b []byte, now int64) {
		s.tally.Events(nfnl.CountMessages(b))
		s.tally.Frame(len(b))
		emit(trace.Frame{Source: trace.LegacyTrace, Time: now, Data: b})
	}
	wait := tick
	if s.Stats().ReceiveBuffer < small {
		wait = shortTick
	}
	_, err := control(nf, func(fd int) (int, error) {
		ready()
		err := nfnl.ReceiveFrom(ctx, fd, nfnl.Handler{
			Tick: wait, Data: data, Overrun: func(int64) { s.tally.Overrun() },
		})
		if err == nil { // what was sent before the end
			_, err = nfnl.DrainFrom(fd, func(b []byte) { data(b, time.Now().UnixNano()) })
		}
		return 0, err
	})
	return err
}

// buffer sets the receive buffer, by force where we may.
func (s *Source) buffer(nf *gonflog.Nflog) error {
	if err := nf.Con.SetReadBuffer(s.config.ReceiveBuffer / 2); err != nil {
		return fmt.Errorf("legacytrace: setting the receive buffer: %w", err)
	}
	_, err := control(nf, func(fd int) (int, error) {
		n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF)
		s.tally.Note(s.tally.Buffer(n, s.config.ReceiveBuffer))
		return n, err
	})
	return err
}

// portID returns the socket's netlink address.
func portID(nf *gonflog.Nflog) (uint32, error) {
	id, err := control(nf, func(fd int) (int, error) {
		name, err := unix.Getsockname(fd)
		if nl, ok := name.(*unix.SockaddrNetlink); ok {
			return int(nl.Pid), err
		}
		return 0, err
	})
	return uint32(id), err
}

func control(nf *gonflog.Nflog, f func(fd int) (int, error)) (n int, err error) {
	raw, err := nf.Con.SyscallConn()
	if err == nil {
		var inner error
		err = raw.Control(func(fd uintptr) { n, inner = f(int(fd)) })
		err = errors.Join(err, inner)
	}
	if err != nil {
		return 0, fmt.Errorf("legacytrace: asking about the socket: %w", err)
	}
	return n, nil
}

// watch looks at the drops now and then, until reading has ended.
func (s *Source) watch(ended <-chan error, d *nfnl.Drops) error {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	for {
		var err error
		done := false
		select {
		case err = <-ended:
			done = true
		case <-look.C:
		}
		d.Look(time.Now().UnixNano())
		if err != nil {
			return fmt.Errorf("legacytrace: reading group %d: %w", group, err)
		}
		if err := d.Err(); err != nil {
			return fmt.Errorf("legacytrace: %w", err)
		}
		if done {
			return nil
		}
	}
}

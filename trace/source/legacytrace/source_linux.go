package legacytrace

import (
	"context"
	"encoding/binary"
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

// lookEvery is how often the kernel is asked what it dropped.
const lookEvery = 200 * time.Millisecond

// Run reads the traces of the calling thread's network namespace until ctx
// ends. It calls ready when the group is bound. The sysctl that sends traces
// there is the caller's. It needs CAP_NET_ADMIN in the namespace and any kernel
// with nfnetlink_log.
func (s *Source) Run(ctx context.Context, ready func(), emit func(trace.Frame)) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	nf, err := gonflog.Open(&gonflog.Config{
		Group: group, Copymode: gonflog.CopyPacket, Bufsize: s.config.CopyRange, Flags: gonflog.FlagSeq,
	})
	if err != nil {
		return fmt.Errorf("legacytrace: opening group %d: %w", group, err)
	}
	if err := s.buffer(nf); err != nil {
		_ = nf.Close()
		return err
	}
	reading, stop := context.WithCancel(ctx)
	defer stop()
	failed := make(chan error, 1)
	var msg, attrs []byte
	packet := func(a gonflog.Attribute) int {
		if reading.Err() != nil {
			return 1
		}
		msg, attrs = encode(msg[:0], attrs[:0], &a)
		s.tally.Events(1)
		s.tally.Frame(len(msg))
		emit(trace.Frame{Source: trace.LegacyTrace, Time: time.Now().UnixNano(), Data: msg})
		return 0
	}
	broken := func(err error) int {
		switch {
		case reading.Err() != nil:
			return 1
		case errors.Is(err, unix.ENOBUFS):
			s.tally.Overrun()
			return 0
		case errors.Is(err, unix.EINTR), errors.Is(err, os.ErrDeadlineExceeded):
			return 0
		}
		failed <- err
		return 1
	}
	// It binds before it returns and reads in the background from then on.
	if err := nf.RegisterWithErrorFunc(reading, packet, broken); err != nil {
		stop()
		_ = nf.Close()
		return fmt.Errorf("legacytrace: binding group %d, which one program at a time can have: %w", group, err)
	}
	port, err := portID(nf)
	if err == nil {
		ready()
		err = s.watch(ctx, failed, &nfnl.Drops{
			Count: func() (uint32, error) { return nfnl.DropsOf(port) },
			Since: time.Now().UnixNano(),
			Report: func(from, to int64, n uint64) {
				s.tally.Lose(from, to, n, "kernel") // each is a datagram of its own
			},
		})
	}
	stop()
	if closeErr := nf.Close(); err == nil && closeErr != nil {
		err = fmt.Errorf("legacytrace: closing group %d: %w", group, closeErr)
	}
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

// watch looks at the drops now and then, until ctx ends or reading has failed.
func (s *Source) watch(ctx context.Context, failed <-chan error, d *nfnl.Drops) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		done := false
		select {
		case <-ctx.Done():
			done = true
		case err := <-failed:
			return fmt.Errorf("legacytrace: reading group %d: %w", group, err)
		case <-tick.C:
		}
		d.Look(time.Now().UnixNano())
		if err := d.Err(); err != nil {
			return fmt.Errorf("legacytrace: %w", err)
		}
		if done {
			return nil
		}
	}
}

// encode makes a nfnetlink_log message of what go-nflog has taken apart, so that
// a Frame is bytes like those of other sources.
func encode(msg, attrs []byte, a *gonflog.Attribute) (m, scratch []byte) {
	be := binary.BigEndian
	if a.Hook != nil {
		attrs = nfnl.AppendAttr(attrs, attrPacketHdr, 0, 0, *a.Hook, 0)
	}
	for _, n := range []struct {
		typ uint16
		v   *uint32
	}{{attrMark, a.Mark}, {attrInDev, a.InDev}, {attrOutDev, a.OutDev}, {attrPhysIn, a.PhysInDev}, {attrPhysOut, a.PhysOutDev}} {
		if n.v != nil {
			attrs = nfnl.AppendAttr(attrs, n.typ, be.AppendUint32(nil, *n.v)...)
		}
	}
	if a.Timestamp != nil {
		ns := a.Timestamp.UnixNano()
		stamp := be.AppendUint64(nil, uint64(ns/1e9))
		attrs = nfnl.AppendAttr(attrs, attrTimestamp, be.AppendUint64(stamp, uint64(ns%1e9/1000))...)
	}
	if a.Payload != nil {
		attrs = nfnl.AppendAttr(attrs, attrPayload, *a.Payload...)
	}
	if a.Prefix != nil {
		attrs = nfnl.AppendAttr(attrs, attrPrefix, append([]byte(*a.Prefix), 0)...)
	}
	return nfnl.AppendMessage(msg, typePacket, 0, 0, nfnl.FamilyUnspec, group, attrs), attrs
}

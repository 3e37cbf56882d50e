package nflog

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"

	gonflog "github.com/florianl/go-nflog/v2"
	"golang.org/x/sys/unix"
)

// Tap reads a group of few packets, such as payload samples or the reports of
// TRACE rules, in the calling thread's network namespace until ctx ends. It
// calls ready when the group is bound, and f for each report, from a
// goroutine of its own. It costs some 15 µs and 50 allocations a packet, so
// the streams that are always on are read by Source instead. An overrun is
// survived and shows as a gap in TapPacket.Seq.
func Tap(ctx context.Context, c TapConfig, ready func(), f func(TapPacket)) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	nf, err := gonflog.Open(&gonflog.Config{
		Group: c.Group, Copymode: gonflog.CopyPacket, Bufsize: c.CopyRange,
		QThresh: 1, Timeout: 1, Flags: gonflog.FlagSeq,
	})
	if err != nil {
		return fmt.Errorf("nflog: tapping group %d: %w", c.Group, err)
	}
	def(&c.ReceiveBuffer, 1<<20)
	if err := nf.Con.SetReadBuffer(c.ReceiveBuffer / 2); err != nil {
		nf.Close()
		return fmt.Errorf("nflog: tapping group %d: setting the receive buffer: %w", c.Group, err)
	}
	reading, stop := context.WithCancel(ctx)
	failed := make(chan error, 1)
	packet := func(a gonflog.Attribute) int {
		if reading.Err() != nil {
			return 1
		}
		f(tapPacket(&a))
		return 0
	}
	broken := func(err error) int {
		switch {
		case reading.Err() != nil:
			return 1
		case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EINTR), errors.Is(err, os.ErrDeadlineExceeded):
			return 0
		}
		failed <- err
		return 1
	}
	// It binds before it returns and reads in the background from then on.
	if err := nf.RegisterWithErrorFunc(reading, packet, broken); err != nil {
		// The library hides the errno; the kernel's table tells.
		if _, held := holder(c.Group); held {
			err = unix.EBUSY
		}
		stop()
		nf.Close()
		return bindError(c.Group, err)
	}
	ready()
	select {
	case <-ctx.Done():
		err = nil
	case err = <-failed:
		err = fmt.Errorf("nflog: tapping group %d: %w", c.Group, err)
	}
	stop()
	if closeErr := nf.Close(); err == nil && closeErr != nil {
		err = fmt.Errorf("nflog: closing the tap of group %d: %w", c.Group, closeErr)
	}
	return err
}

func tapPacket(a *gonflog.Attribute) TapPacket {
	p := TapPacket{
		Prefix: deref(a.Prefix), Payload: deref(a.Payload), Hook: deref(a.Hook), Mark: deref(a.Mark),
		InDev: deref(a.InDev), OutDev: deref(a.OutDev), PhysIn: deref(a.PhysInDev), PhysOut: deref(a.PhysOutDev),
		UID: deref(a.UID), Local: a.UID != nil, Seq: deref(a.Seq), Time: deref(a.Timestamp),
	}
	return p
}

func deref[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// Probe reports whether this kernel, in the calling thread's network
// namespace, lets us listen to a group: nil if it does, a *HeldError if
// another program (perhaps kptrace itself) listens to it, and else what is
// missing. It binds the group for a moment, and so must not be tried on one
// that kptrace is about to open. It does not prove that rules reach the
// group; only packets do.
func Probe(ctx context.Context, group uint16) error {
	if _, held := holder(group); held {
		return bindError(group, unix.EBUSY)
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	bound := false
	err := Tap(ctx, TapConfig{Group: group}, func() {
		_, bound = holder(group)
		stop()
	}, func(TapPacket) {})
	if err == nil && !bound {
		err = fmt.Errorf("nflog: group %d is bound, but /proc/net/netfilter/nfnetlink_log does not show it", group)
	}
	return err
}

package nflog

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/trace"
)

// Messages and attributes that configure a group
// (linux/netfilter/nfnetlink_log.h).
const (
	msgConfig    = 1
	cfgCmd       = 1
	cfgMode      = 2
	cfgNLBufSize = 3
	cfgTimeout   = 4
	cfgQThresh   = 5
	cfgFlags     = 6

	cmdBind    = 1
	copyPacket = 2
	flagSeq    = 1
)

// Run reads the group in the calling thread's network namespace until ctx
// ends. It calls ready when the group is bound and configured; where another
// program holds the group it fails with a *HeldError. It needs CAP_NET_ADMIN
// in the namespace and any kernel with nfnetlink_log.
func (s *Source) Run(ctx context.Context, ready func(), emit func(trace.Frame)) error {
	stamps, err := keepStamps()
	if err != nil {
		return err
	}
	defer unix.Close(stamps)
	sock, err := nfnl.Open(s.config.ReceiveBuffer)
	if err != nil {
		return fmt.Errorf("nflog: %w", err)
	}
	defer sock.Close()
	s.tally.Note(s.tally.Buffer(sock.ReceiveBuffer(), s.config.ReceiveBuffer))
	if err := s.bind(sock); err != nil {
		return err
	}
	ready()
	c := &counter{last: time.Now().UnixNano(), report: func(from, to int64, n uint64) {
		s.tally.Lose(from, to, n, "kernel")
	}}
	err = sock.Receive(ctx, nfnl.Handler{
		Tick: s.config.Tick,
		Data: func(data []byte, now int64) {
			s.tally.Events(c.frame(data, now))
			s.tally.Frame(len(data))
			emit(trace.Frame{Source: trace.NFLog, Time: now, Data: data})
		},
		Overrun: func(now int64) {
			s.tally.Overrun()
			c.overran(now)
		},
		Idle: c.idle,
	})
	if err != nil {
		return fmt.Errorf("nflog: reading group %d: %w", s.config.Group, err)
	}
	return nil
}

// bind takes the group and configures it in one message, so that it never
// runs with the kernel's defaults.
func (s *Source) bind(sock *nfnl.Socket) error {
	c := &s.config
	be := binary.BigEndian
	attrs := nfnl.AppendAttr(nil, cfgCmd, cmdBind)
	attrs = nfnl.AppendAttr(attrs, cfgMode, append(be.AppendUint32(nil, c.CopyRange), copyPacket, 0)...)
	attrs = nfnl.AppendAttr(attrs, cfgNLBufSize, be.AppendUint32(nil, c.NLBufSize)...)
	attrs = nfnl.AppendAttr(attrs, cfgTimeout, be.AppendUint32(nil, uint32(max(c.Timeout/(10*time.Millisecond), 1)))...)
	attrs = nfnl.AppendAttr(attrs, cfgQThresh, be.AppendUint32(nil, c.QThresh)...)
	attrs = nfnl.AppendAttr(attrs, cfgFlags, be.AppendUint16(nil, flagSeq)...)
	err := sock.Request(nfnl.Type(nfnl.SubsysULog, msgConfig), nfnl.FamilyUnspec, c.Group, attrs)
	if err != nil {
		return bindError(c.Group, err)
	}
	return nil
}

// bindError says why a group could not be bound. The kernel answers EPERM
// both to those who may not and where somebody else has it.
func bindError(group uint16, err error) error {
	if portID, held := holder(group); held && (errors.Is(err, unix.EPERM) || errors.Is(err, unix.EBUSY)) {
		p := nfnl.Owner(portID)
		return &HeldError{Group: group, PortID: portID, PID: p.PID, Command: p.Command, Err: err}
	}
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("nflog: binding group %d needs CAP_NET_ADMIN in this network namespace: %w", group, err)
	}
	return fmt.Errorf("nflog: binding group %d: %w", group, err)
}

// holder finds who listens to a group in the calling thread's namespace.
func holder(group uint16) (portID uint32, held bool) {
	groups, err := nfnl.Groups()
	if err != nil {
		return 0, false
	}
	portID, held = groups[group]
	return portID, held
}

// keepStamps opens a socket that wants time stamps. While one exists on the
// machine, the kernel stamps all packets, and NFLOG reports the stamps.
func keepStamps() (fd int, err error) {
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("nflog: opening a socket for time stamps: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("nflog: asking for time stamps: %w", err)
	}
	return fd, nil
}

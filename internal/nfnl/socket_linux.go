package nfnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// ackTimeout is how long the kernel may take to answer a request, which it
// does within the system call that sends it.
const ackTimeout = 2 * time.Second

// Socket is a NETLINK_NETFILTER socket in one network namespace. It has one
// user at a time, except for Drops.
type Socket struct {
	fd     int
	portID uint32
	seq    uint32
	rcvbuf int
	// table is /proc/net/netlink of the socket's namespace; an open file of
	// it keeps showing that namespace whoever reads it.
	table *os.File
	// early is what came before the answer to a request; answers is where
	// answers are read to.
	early, answers []byte
}

// Open opens a socket in the network namespace of the calling thread and asks
// for a receive buffer of the given size in bytes. See ReceiveBuffer for what
// was granted.
func Open(receiveBuffer int) (*Socket, error) {
	// Both descriptors must come from the same thread's namespace.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("nfnl: opening a netlink socket: %w", err)
	}
	s := &Socket{fd: fd}
	if err := s.setUp(receiveBuffer); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Socket) setUp(receiveBuffer int) error {
	// The kernel doubles what is asked for, to pay for its own bookkeeping.
	half := receiveBuffer / 2
	if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, half); err != nil {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, half); err != nil {
			return fmt.Errorf("nfnl: setting the receive buffer: %w", err)
		}
	}
	var err error
	if s.rcvbuf, err = unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUF); err != nil {
		return fmt.Errorf("nfnl: reading the receive buffer's size: %w", err)
	}
	if err := unix.Bind(s.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("nfnl: binding: %w", err)
	}
	name, err := unix.Getsockname(s.fd)
	if err != nil {
		return fmt.Errorf("nfnl: reading the port id: %w", err)
	}
	nl, ok := name.(*unix.SockaddrNetlink)
	if !ok {
		return fmt.Errorf("nfnl: reading the port id: %w", unix.EAFNOSUPPORT)
	}
	s.portID = nl.Pid
	if s.table, err = os.Open("/proc/thread-self/net/netlink"); err != nil {
		return fmt.Errorf("nfnl: opening the table of netlink sockets: %w", err)
	}
	return nil
}

// Close closes the socket. The kernel then forgets what was bound to it, such
// as an NFLOG group.
func (s *Socket) Close() error {
	if s.table != nil {
		s.table.Close()
	}
	return unix.Close(s.fd)
}

// PortID returns the socket's address, which is usually the process id.
func (s *Socket) PortID() uint32 { return s.portID }

// ReceiveBuffer returns the buffer's size in bytes as the kernel granted it
// and counts it: what was asked for where we may force it (CAP_NET_ADMIN in
// the first user namespace), else at most twice net.core.rmem_max.
func (s *Socket) ReceiveBuffer() int { return s.rcvbuf }

// Join joins a multicast group.
func (s *Socket) Join(group int) error {
	err := unix.SetsockoptInt(s.fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group)
	if err != nil {
		return fmt.Errorf("nfnl: joining group %d: %w", group, err)
	}
	return nil
}

// Leave leaves a multicast group. What has arrived stays to be read.
func (s *Socket) Leave(group int) error {
	err := unix.SetsockoptInt(s.fd, unix.SOL_NETLINK, unix.NETLINK_DROP_MEMBERSHIP, group)
	if err != nil {
		return fmt.Errorf("nfnl: leaving group %d: %w", group, err)
	}
	return nil
}

// Drain hands what has arrived to f, datagram by datagram, and does not wait.
// It is for streams that somebody looks at now and then; see Receive for
// others. Overrun says that the kernel had to drop something.
func (s *Socket) Drain(f func(data []byte)) (overrun bool, err error) {
	if s.answers == nil {
		s.answers = make([]byte, maxDatagram)
	}
	return drainFrom(s.fd, s.answers, f)
}

// DrainFrom is Drain for a socket that somebody else opened and that does not
// block.
func DrainFrom(fd int, f func(data []byte)) (overrun bool, err error) {
	return drainFrom(fd, make([]byte, maxDatagram), f)
}

func drainFrom(fd int, buf []byte, f func(data []byte)) (overrun bool, err error) {
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case err == nil && n > 0:
			f(buf[:n])
		case err == nil, errors.Is(err, unix.EAGAIN):
			return overrun, nil
		case errors.Is(err, unix.ENOBUFS):
			overrun = true
		case errors.Is(err, unix.EINTR):
		default:
			return overrun, fmt.Errorf("nfnl: reading messages: %w", err)
		}
	}
}

// Request sends one message and waits for the kernel to acknowledge it. A
// refusal is an error in which errors.Is finds the errno. Other messages that
// arrive meanwhile are kept for Receive.
func (s *Socket) Request(typ uint16, family uint8, resID uint16, attrs []byte) error {
	early, err := s.exchange(typ, family, resID, attrs)
	s.early = append(s.early, early...)
	return err
}

// Query is Request for a message that has an answer, which it returns whole.
// It is for sockets on which nothing else arrives.
func (s *Socket) Query(typ uint16, family uint8, attrs []byte) (answer []byte, err error) {
	answer, err = s.exchange(typ, family, 0, attrs)
	if err == nil && len(answer) == 0 {
		err = fmt.Errorf("nfnl: the kernel agrees but does not answer: %w", unix.ENODATA)
	}
	return answer, err
}

// Dump asks for everything of a kind and hands the answer to f, datagram by
// datagram. It is for sockets on which nothing else arrives. A dump that others
// change meanwhile may have gaps.
func (s *Socket) Dump(typ uint16, family uint8, attrs []byte, f func(data []byte)) error {
	s.seq++
	msg := AppendMessage(nil, typ, FlagRequest|FlagDump, s.seq, family, 0, attrs)
	if err := unix.Sendto(s.fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("nfnl: sending a request: %w", err)
	}
	if s.answers == nil {
		s.answers = make([]byte, maxDatagram)
	}
	deadline := time.Now().Add(dumpTimeout)
	for {
		n, err := unix.Read(s.fd, s.answers)
		switch {
		case err == nil:
			f(s.answers[:n])
			if errno, over := s.dumped(s.answers[:n]); over {
				if errno != 0 {
					return fmt.Errorf("nfnl: the kernel refuses: %w", errno)
				}
				return nil
			}
		case errors.Is(err, unix.EAGAIN):
			left := time.Until(deadline)
			if left <= 0 {
				return fmt.Errorf("nfnl: waiting for a dump: %w", unix.ETIMEDOUT)
			}
			fds := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}
			_, _ = unix.Poll(fds, int(left.Milliseconds())+1)
		case errors.Is(err, unix.EINTR):
		default:
			return fmt.Errorf("nfnl: reading a dump: %w", err)
		}
	}
}

// dumpTimeout is how long a dump of everything may take.
const dumpTimeout = 30 * time.Second

// dumped finds the end of a dump in one datagram.
func (s *Socket) dumped(b []byte) (errno unix.Errno, over bool) {
	for len(b) >= HeaderLen {
		n := int(binary.NativeEndian.Uint32(b))
		if n < HeaderLen || n > len(b) {
			return unix.EBADMSG, true
		}
		switch typ := binary.NativeEndian.Uint16(b[4:]); {
		case typ == typeDone:
			return 0, true
		case typ == typeError && n >= HeaderLen+4:
			return unix.Errno(-int32(binary.NativeEndian.Uint32(b[HeaderLen:]))), true
		}
		b = b[min(align(n), len(b)):]
	}
	return 0, false
}

// Batch sends messages of one subsystem that are carried out together or not at
// all, each made by AppendMessage with FlagAck, and returns the first refusal.
func (s *Socket) Batch(subsys uint16, msgs ...[]byte) error {
	buf := AppendMessage(nil, typeBatchBegin, FlagRequest, 0, FamilyUnspec, subsys, nil)
	for _, m := range msgs {
		s.seq++
		binary.NativeEndian.PutUint32(m[8:], s.seq)
		buf = append(buf, m...)
	}
	buf = AppendMessage(buf, typeBatchEnd, FlagRequest, 0, FamilyUnspec, subsys, nil)
	if err := unix.Sendto(s.fd, buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("nfnl: sending a batch: %w", err)
	}
	if s.answers == nil {
		s.answers = make([]byte, maxDatagram)
	}
	deadline := time.Now().Add(ackTimeout)
	for left := len(msgs); left > 0; {
		n, err := unix.Read(s.fd, s.answers)
		switch {
		case err == nil:
			for b := s.answers[:n]; len(b) >= HeaderLen+4 && left > 0; {
				size := int(binary.NativeEndian.Uint32(b))
				if size < HeaderLen+4 || size > len(b) {
					return fmt.Errorf("nfnl: reading an answer: %w", unix.EBADMSG)
				}
				if binary.NativeEndian.Uint16(b[4:]) == typeError {
					if errno := unix.Errno(-int32(binary.NativeEndian.Uint32(b[HeaderLen:]))); errno != 0 {
						return fmt.Errorf("nfnl: the kernel refuses: %w", errno)
					}
					left--
				}
				b = b[min(align(size), len(b)):]
			}
		case errors.Is(err, unix.EAGAIN):
			if time.Now().After(deadline) {
				return fmt.Errorf("nfnl: waiting for an answer: %w", unix.ETIMEDOUT)
			}
			fds := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}
			_, _ = unix.Poll(fds, 100)
		case errors.Is(err, unix.EINTR):
		default:
			return fmt.Errorf("nfnl: reading an answer: %w", err)
		}
	}
	return nil
}

// exchange sends a message and reads until it is acknowledged. It returns the
// datagrams that came before.
func (s *Socket) exchange(typ uint16, family uint8, resID uint16, attrs []byte) (before []byte, err error) {
	s.seq++
	msg := AppendMessage(nil, typ, FlagRequest|FlagAck, s.seq, family, resID, attrs)
	if err := unix.Sendto(s.fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("nfnl: sending a request: %w", err)
	}
	if s.answers == nil {
		s.answers = make([]byte, maxDatagram)
	}
	buf := s.answers
	deadline := time.Now().Add(ackTimeout)
	for {
		n, err := unix.Read(s.fd, buf)
		switch {
		case err == nil:
			errno, ok := s.acked(buf[:n])
			if ok && errno != 0 {
				return before, fmt.Errorf("nfnl: the kernel refuses: %w", errno)
			}
			if ok {
				return before, nil
			}
			before = append(before, buf[:align(n)]...)
		case errors.Is(err, unix.EAGAIN):
			left := time.Until(deadline)
			if left <= 0 {
				return before, fmt.Errorf("nfnl: waiting for an answer: %w", unix.ETIMEDOUT)
			}
			fds := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}
			_, _ = unix.Poll(fds, int(left.Milliseconds())+1)
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENOBUFS):
			// ENOBUFS says that the stream overran, not that the answer is lost.
		default:
			return before, fmt.Errorf("nfnl: reading an answer: %w", err)
		}
	}
}

// acked finds the answer to the last request in one datagram.
func (s *Socket) acked(b []byte) (errno unix.Errno, ok bool) {
	if len(b) < HeaderLen+4 ||
		binary.NativeEndian.Uint16(b[4:]) != typeError ||
		binary.NativeEndian.Uint32(b[8:]) != s.seq {
		return 0, false
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(b[HeaderLen:]))), true
}

package nlbatch

import (
	"errors"
	"fmt"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The bounds of one system call. The kernel keeps one answer for each refused
// message, some 800 bytes with its bookkeeping, in a receive buffer of which an
// ordinary user has 208 KiB; so all of a call may be refused and none is lost.
const (
	maxMessages = 200
	maxBytes    = 64 << 10
)

// patience is how long the kernel may take to answer, which it does within the
// call that sends.
const patience = 30 * time.Second

// ErrUncertain says that it is not known which requests the kernel took: look
// before writing again.
var ErrUncertain = errors.New("some answers of the kernel were lost")

// Conn is a netlink socket for requests. It has one user at a time.
type Conn struct {
	fd  int
	seq uint32
	out []byte
	in  []byte
}

// Open opens a socket of a netlink protocol, such as unix.NETLINK_GENERIC, in
// the network namespace of the calling thread.
func Open(protocol int) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, fmt.Errorf("nlbatch: opening a netlink socket: %w", err)
	}
	// Answers need not repeat the request (Linux 4.3).
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	tv := unix.NsecToTimeval(patience.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv),
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("nlbatch: setting up a netlink socket: %w", err)
	}
	return &Conn{fd: fd, in: make([]byte, 32<<10)}, nil
}

// Close closes the socket.
func (c *Conn) Close() error { return unix.Close(c.fd) }

// Do sends all messages in their order, and returns for each what the kernel
// said: nil where it took it, else an errno. The kernel goes on behind a refused
// message. An error of Do itself says that some are of unknown fate, which then
// have ErrUncertain.
func (c *Conn) Do(msgs []Message) ([]error, error) {
	results := make([]error, len(msgs))
	for from := 0; from < len(msgs); {
		to := from
		c.out = c.out[:0]
		first := c.seq + 1
		for to < len(msgs) && to-from < maxMessages && (to == from || len(c.out)+headerLen+len(msgs[to].Body) <= maxBytes) {
			last := to+1 == len(msgs) || to+1-from == maxMessages || len(c.out)+2*headerLen+len(msgs[to].Body)+len(msgs[min(to+1, len(msgs)-1)].Body) > maxBytes
			c.seq++
			c.out = msgs[to].append(c.out, c.seq, last)
			if to++; last {
				break
			}
		}
		if err := c.exchange(first, results[from:to]); err != nil {
			for i := from; i < len(msgs); i++ {
				if results[i] == nil {
					results[i] = ErrUncertain
				}
			}
			return results, fmt.Errorf("nlbatch: %w", err)
		}
		from = to
	}
	return results, nil
}

// exchange sends what is in out and reads answers up to that to the last
// message, which comes last.
func (c *Conn) exchange(first uint32, results []error) error {
	for {
		err := unix.Sendto(c.fd, c.out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("sending %d requests: %w", len(results), err)
		}
	}
	last := first + uint32(len(results)) - 1 //nolint:gosec // at most maxMessages
	for done := false; !done; {
		n, _, err := unix.Recvfrom(c.fd, c.in, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOBUFS):
			return ErrUncertain
		case err != nil:
			return fmt.Errorf("reading the kernel's answers: %w: %w", err, ErrUncertain)
		}
		err = answers(c.in[:n], func(seq uint32, errno syscall.Errno) {
			if i := seq - first; i < uint32(len(results)) && errno != 0 { //nolint:gosec // at most maxMessages
				results[i] = errno
			}
			done = done || seq == last
		})
		if err != nil {
			return fmt.Errorf("%w: %w", err, ErrUncertain)
		}
	}
	return nil
}

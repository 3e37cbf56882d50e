package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	ct "github.com/ti-mo/conntrack"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/nfnl"
)

// dumpTries is how often an interrupted dump is begun anew.
const dumpTries = 4

// Conn asks the kernel about entries of one network namespace. It is safe for
// concurrent use; one question is on its way at a time.
//
// The Tuple of an ICMP entry has the echo id as its sending port, and type
// and code as the upper and lower byte of its receiving port.
type Conn struct {
	mu sync.Mutex
	// conn dumps and counts. sock gets and deletes: the library leaves the
	// entry's ID out of a deletion, and waits forever for the end of an
	// answer that the kernel marks as one of many and sends alone.
	conn *ct.Conn
	sock *nfnl.Socket
	proc *os.File
}

// Open connects to the table of the calling thread's network namespace, to
// which the Conn then belongs whoever uses it. It needs CAP_NET_ADMIN there.
func Open(c Config) (*Conn, error) {
	if c.ReceiveBuffer == 0 {
		c.ReceiveBuffer = 1 << 20
	}
	// All three descriptors must come from the same thread's namespace.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	conn, err := ct.Dial(&netlink.Config{})
	if err != nil {
		return nil, fmt.Errorf("conntrack: connecting: %w", err)
	}
	if err := conn.SetReadBuffer(c.ReceiveBuffer / 2); err != nil {
		conn.Close()
		return nil, fmt.Errorf("conntrack: setting the receive buffer: %w", err)
	}
	sock, err := nfnl.Open(64 << 10)
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("conntrack: connecting: %w", err)
	}
	proc, err := os.Open("/proc/thread-self/net/stat/nf_conntrack")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		conn.Close()
		sock.Close()
		return nil, fmt.Errorf("conntrack: connecting: %w", err)
	}
	return &Conn{conn: conn, sock: sock, proc: proc}, nil
}

// Close ends the connection.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := errors.Join(c.conn.Close(), c.sock.Close())
	if c.proc != nil {
		err = errors.Join(err, c.proc.Close())
	}
	if err != nil {
		return fmt.Errorf("conntrack: closing: %w", err)
	}
	return nil
}

// Dump hands every entry of both families to f, in no order; an error of f
// ends it. The kernel's table changes meanwhile: an entry made or moved during
// the dump may be missing or come twice, and expired ones the kernel has not
// yet swept out are left out. A dump that a signal interrupts is begun anew a
// few times before f sees anything of it.
func (c *Conn) Dump(ctx context.Context, f func(Flow) error) error {
	flows, err := c.dump(ctx)
	if err != nil {
		return fmt.Errorf("conntrack: dumping the table: %w", err)
	}
	for i := range flows {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("conntrack: dumping the table: %w", err)
		}
		if err := f(flowOf(&flows[i])); err != nil {
			return err
		}
	}
	return nil
}

func (c *Conn) dump(ctx context.Context) (flows []ct.Flow, err error) {
	for range dumpTries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		c.mu.Lock()
		flows, err = c.conn.Dump(nil)
		c.mu.Unlock()
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return flows, err
}

// Get returns the entry that has t as its original or as its reply tuple. Where there is none, errors.Is(err, fs.ErrNotExist) holds.
func (c *Conn) Get(t Tuple) (Flow, error) {
	if t.IsZero() {
		return Flow{}, fmt.Errorf("conntrack: getting an entry: the tuple is empty")
	}
	c.mu.Lock()
	answer, err := c.sock.Query(nfnl.Type(nfnl.SubsysConntrack, msgGet), family(t), appendTuple(nil, ctaTupleOrig, t))
	c.mu.Unlock()
	if err != nil {
		return Flow{}, fmt.Errorf("conntrack: getting %v: %w", t, notExist(err))
	}
	// The answer has the form of an event.
	var m netlink.Message
	var entry ct.Event
	if err := m.UnmarshalBinary(answer); err != nil {
		return Flow{}, fmt.Errorf("conntrack: reading the entry of %v: %w", t, err)
	}
	if err := entry.Unmarshal(m); err != nil {
		return Flow{}, fmt.Errorf("conntrack: reading the entry of %v: %w", t, err)
	}
	return flowOf(entry.Flow), nil
}

// Create makes an entry of f's tuples, which translates nothing, as of a connection
// of TCP that is established. It ends after f.Timeout.
func (c *Conn) Create(f Flow) error {
	tuple := func(t Tuple) ct.Tuple {
		src, dst := t.Src(), t.Dst()
		return ct.Tuple{
			IP:    ct.IPTuple{SourceAddress: src.Addr(), DestinationAddress: dst.Addr()},
			Proto: ct.ProtoTuple{Protocol: uint8(t.Proto()), SourcePort: src.Port(), DestinationPort: dst.Port()},
		}
	}
	c.mu.Lock()
	err := c.conn.Create(ct.Flow{
		TupleOrig: tuple(f.Orig), TupleReply: tuple(f.Reply), Timeout: uint32(f.Timeout / time.Second),
		ProtoInfo: ct.ProtoInfo{TCP: &ct.ProtoInfoTCP{State: uint8(TCPEstablished)}},
	})
	c.mu.Unlock()
	if err != nil {
		return fmt.Errorf("conntrack: making %v: %w", f.Orig, err)
	}
	return nil
}

// Delete removes the entry that has f.Orig as one of its tuples, if it still is
// the one that f describes: where f.ID is not zero it must match, too. Where
// there is no such entry nothing is removed and errors.Is(err,
// fs.ErrNotExist) holds.
func (c *Conn) Delete(f Flow) error {
	if f.Orig.IsZero() {
		return fmt.Errorf("conntrack: deleting an entry: the original tuple is empty")
	}
	attrs := appendTuple(nil, ctaTupleOrig, f.Orig)
	if f.ID != 0 {
		attrs = nfnl.AppendAttr(attrs, ctaID, binary.BigEndian.AppendUint32(nil, f.ID)...)
	}
	c.mu.Lock()
	err := c.sock.Request(nfnl.Type(nfnl.SubsysConntrack, msgDelete), family(f.Orig), 0, attrs)
	c.mu.Unlock()
	if err != nil {
		return fmt.Errorf("conntrack: deleting %v: %w", f.Orig, notExist(err))
	}
	return nil
}

// Stats returns the tracker's counters.
func (c *Conn) Stats() (Stats, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var s Stats
	cpus, err := c.conn.Stats()
	if err != nil {
		return Stats{}, fmt.Errorf("conntrack: reading the counters: %w", err)
	}
	for _, cpu := range cpus {
		s.Found += uint64(cpu.Found)
		s.Invalid += uint64(cpu.Invalid)
		s.InsertFailed += uint64(cpu.InsertFailed)
		s.Drop += uint64(cpu.Drop)
		s.EarlyDrop += uint64(cpu.EarlyDrop)
		s.SearchRestart += uint64(cpu.SearchRestart)
	}
	answer, err := c.sock.Query(nfnl.Type(nfnl.SubsysConntrack, msgGetStats), nfnl.FamilyUnspec, nil)
	if err != nil {
		return Stats{}, fmt.Errorf("conntrack: reading the table's size: %w", err)
	}
	for m := nfnl.NewMessages(answer); m.Next(); {
		for a := m.Attrs(); a.Next(); {
			switch a.Type {
			case ctaGlobalEntries:
				s.Entries = uint64(a.Uint32())
			case ctaGlobalMaxEntries:
				s.Limit = uint64(a.Uint32())
			}
		}
	}
	if c.proc != nil {
		if err := s.addProc(c.proc); err != nil {
			return Stats{}, fmt.Errorf("conntrack: reading the counters: %w", err)
		}
	}
	return s, nil
}

// notExist makes the kernel's answer errors.Is(err, fs.ErrNotExist), which
// the netlink libraries' wrapping hides.
func notExist(err error) error {
	if errors.Is(err, unix.ENOENT) && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	return err
}

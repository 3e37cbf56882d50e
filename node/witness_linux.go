package node

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

const (
	// witnessFor is how long the wire is looked at for a flow: its client has sent
	// the SYN once more by then, after 3 s and 7 s at the latest.
	witnessFor = 8 * time.Second
	// witnessMost bounds the endpoints that are looked for at a time. Flows to others
	// keep the reason they have.
	witnessMost = 8
	// witnessRead bounds how long one receive waits.
	witnessRead = 100 * time.Millisecond
	// witnessLen is what is read of a packet: its IP and TCP headers.
	witnessLen = 128
)

// witness looks at the wire, for a moment, for answers to SYNs that no rule reported:
// those that went past the node's translation. Nobody looks as long as there is no
// SYN without an answer.
type witness struct {
	asked chan correlate.Inquiry
	do    func(context.Context, func(*correlate.Correlator)) error
}

func newWitness(do func(context.Context, func(*correlate.Correlator)) error) *witness {
	return &witness{asked: make(chan correlate.Inquiry, inquiries), do: do}
}

// ask takes a flow, if there is room.
func (w *witness) ask(in correlate.Inquiry) {
	select {
	case w.asked <- in:
	default:
	}
}

// run waits for flows until ctx ends. Where the wire cannot be looked at, flows keep
// the reason they have.
func (w *witness) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case in := <-w.asked:
			x := watched{flows: map[conntrack.Tuple]awaited{}}
			x.add(in, time.Now())
			if err := w.look(ctx, &x); err != nil {
				// No CAP_NET_RAW, or the device list changed: not before a while.
				select {
				case <-ctx.Done():
				case <-time.After(witnessFor):
				}
			}
		}
	}
}

// look reads packets until no flow is awaited any more.
func (w *witness) look(ctx context.Context, x *watched) error {
	runtime.LockOSThread() // the socket is of the thread's namespace
	defer runtime.UnlockOSThread()
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	wait := unix.NsecToTimeval(int64(witnessRead))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	if err := x.filter(fd); err != nil {
		return err
	}
	const all = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // also what leaves, and ports of bridges
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	buf := make([]byte, witnessLen)
	for len(x.flows) > 0 && ctx.Err() == nil {
		for more := true; more; {
			select {
			case in := <-w.asked:
				if x.add(in, time.Now()) {
					if err := x.filter(fd); err != nil {
						return err
					}
				}
			default:
				more = false
			}
		}
		n, from, err := unix.Recvfrom(fd, buf, 0)
		x.expire(time.Now())
		switch {
		case err == nil:
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR), errors.Is(err, unix.ENETDOWN): // a device went
			continue
		default:
			return os.NewSyscallError("recvfrom", err)
		}
		ll, ok := from.(*unix.SockaddrLinklayer)
		if !ok {
			continue
		}
		f, cause := x.saw(buf[:n], ll.Pkttype == unix.PACKET_OUTGOING)
		if f == nil {
			continue
		}
		cause = fmt.Sprintf(cause, deviceName(ll.Ifindex))
		err = w.do(ctx, func(c *correlate.Correlator) { c.Explain(f.ID, f.Tuple, trace.ReplyBypassed, cause) })
		if err != nil {
			return err
		}
	}
	return nil
}

func deviceName(index int) string {
	dev, err := net.InterfaceByIndex(index)
	if err != nil {
		return fmt.Sprintf("device %d", index)
	}
	return dev.Name
}

// watched are the flows whose answers are looked for, by the tuple of the answer as
// the endpoint sends it.
type watched struct {
	flows map[conntrack.Tuple]awaited
	// endpoints are those that the kernel looks for.
	endpoints []netip.Addr
}

type awaited struct {
	flow  *trace.Flow
	isn   uint32
	until time.Time
}

// add adds a flow, if there is room, and reports whether its endpoint is a new one.
func (x *watched) add(in correlate.Inquiry, now time.Time) bool {
	ep := in.Flow.Backend.Addr.Addr()
	known := slices.Contains(x.endpoints, ep)
	if !ep.IsValid() || len(x.flows) >= inquiries || !known && len(x.endpoints) >= witnessMost {
		return false
	}
	x.flows[in.Flow.Reply] = awaited{in.Flow, in.ISN, now.Add(witnessFor)}
	if !known {
		x.endpoints = append(x.endpoints, ep)
	}
	return !known
}

// expire forgets flows that were looked for for long enough.
func (x *watched) expire(now time.Time) {
	for t, a := range x.flows {
		if now.After(a.until) {
			delete(x.flows, t)
		}
	}
}

// saw takes a packet from its IP header on, and returns the flow whose answer it shows
// to have gone past the node's translation, with a sentence that lacks the name of the
// device. These are the SYN-ACK that leaves with the endpoint's own address, and a
// reset by which the client turns it down (RFC 9293, 3.10.7.3: its number is the one
// that the SYN-ACK acknowledged), on its way in.
func (x *watched) saw(packet []byte, leaves bool) (f *trace.Flow, cause string) {
	t, tcp := tcpOf(packet)
	if tcp == nil {
		return nil, ""
	}
	const syn, rst, ack = 0x02, 0x04, 0x10
	flags := tcp[13] & (syn | rst | ack)
	key := t
	if flags == rst {
		key = t.Reverse()
	}
	a, ok := x.flows[key]
	switch {
	case !ok:
		return nil, ""
	case flags == syn|ack && leaves && binary.BigEndian.Uint32(tcp[8:]) == a.isn+1:
		cause = "the endpoint's SYN-ACK left by %s untranslated"
	case flags == rst && !leaves && binary.BigEndian.Uint32(tcp[4:]) == a.isn+1:
		cause = "the client turned down the endpoint's own SYN-ACK: its reset came in by %s"
	default:
		return nil, ""
	}
	delete(x.flows, key)
	return a.flow, cause
}

// tcpOf finds the TCP header of a packet that begins with its IP header; nil if there
// is none in full.
func tcpOf(b []byte) (t conntrack.Tuple, tcp []byte) {
	if len(b) < 20 {
		return t, nil
	}
	var src, dst netip.Addr
	switch b[0] >> 4 {
	case 4:
		if b[9] != unix.IPPROTO_TCP || binary.BigEndian.Uint16(b[6:])&0x1fff != 0 {
			return t, nil
		}
		src, dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		b = b[min(len(b), int(b[0]&0xf)*4):]
	case 6:
		if len(b) < 40 || b[6] != unix.IPPROTO_TCP {
			return t, nil
		}
		src, dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		b = b[40:]
	}
	if !src.IsValid() || len(b) < 20 {
		return t, nil
	}
	port := func(at int) uint16 { return binary.BigEndian.Uint16(b[at:]) }
	return conntrack.NewTuple(conntrack.TCP, netip.AddrPortFrom(src, port(0)), netip.AddrPortFrom(dst, port(2))), b
}

// filter has the kernel pass on SYN-ACKs and resets from and to the endpoints, and
// nothing else.
func (x *watched) filter(fd int) error {
	prog, err := bpf.Assemble(witnessFilter(x.endpoints))
	if err != nil {
		return err
	}
	raw := make([]unix.SockFilter, len(prog))
	for i, p := range prog {
		raw[i] = unix.SockFilter{Code: p.Op, Jt: p.Jt, Jf: p.Jf, K: p.K}
	}
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(raw)), Filter: &raw[0]})
	return os.NewSyscallError("setsockopt", err)
}

// witnessFilter is that program, for packets from their IP header on. Of an address of
// IPv6 it compares the second half.
func witnessFilter(endpoints []netip.Addr) []bpf.Instruction {
	pass, drop := bpf.RetConstant{Val: witnessLen}, bpf.RetConstant{}
	must := func(cond bpf.JumpTest, v uint32) []bpf.Instruction {
		return []bpf.Instruction{bpf.JumpIf{Cond: cond, Val: v, SkipTrue: 1}, drop}
	}
	// flags passes SYN-ACKs and resets, with X at the TCP header.
	flags := []bpf.Instruction{
		bpf.LoadIndirect{Off: 13, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 0x04, SkipTrue: 3},
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 0x12},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0x12, SkipTrue: 1},
		drop,
	}
	four := []bpf.Instruction{bpf.LoadAbsolute{Off: 9, Size: 1}}
	four = append(four, must(bpf.JumpEqual, unix.IPPROTO_TCP)...)
	four = append(four, bpf.LoadMemShift{Off: 0})
	four = append(four, flags...)
	six := []bpf.Instruction{bpf.LoadAbsolute{Off: 6, Size: 1}}
	six = append(six, must(bpf.JumpEqual, unix.IPPROTO_TCP)...)
	six = append(six, bpf.LoadConstant{Dst: bpf.RegX, Val: 40})
	six = append(six, flags...)
	for _, ep := range endpoints {
		b := ep.AsSlice()
		word := func(at int) uint32 { return binary.BigEndian.Uint32(b[at:]) }
		if ep.Is4() {
			for _, off := range []uint32{12, 16} {
				four = append(four, bpf.LoadAbsolute{Off: off, Size: 4}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: word(0), SkipFalse: 1}, pass)
			}
			continue
		}
		for _, off := range []uint32{8, 24} {
			six = append(six,
				bpf.LoadAbsolute{Off: off + 12, Size: 4}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: word(12), SkipFalse: 3},
				bpf.LoadAbsolute{Off: off + 8, Size: 4}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: word(8), SkipFalse: 1}, pass)
		}
	}
	four, six = append(four, drop), append(six, drop)
	prog := []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtProto},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_IP, SkipFalse: uint8(len(four))},
	}
	prog = append(prog, four...)
	prog = append(prog, bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_IPV6, SkipTrue: 1}, drop)
	return append(prog, six...)
}

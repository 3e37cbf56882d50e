package drop

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/trace"
)

// reasonNames reads the kernel's names of reasons, nil where it has none.
func reasonNames() map[uint32]string {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return nil
	}
	var enum *btf.Enum
	if err := spec.TypeByName("skb_drop_reason", &enum); err != nil {
		return nil
	}
	names := make(map[uint32]string, len(enum.Values))
	for _, v := range enum.Values {
		names[uint32(v.Value)] = strings.TrimPrefix(v.Name, "SKB_DROP_REASON_")
	}
	return names
}

// Run reads the notices of the calling thread's network namespace until ctx ends.
// It calls ready when the program is attached.
func (s *Source) Run(ctx context.Context, ready func(), emit func(trace.Frame)) error {
	inum, err := namespace()
	if err != nil {
		return err
	}
	a, err := s.attach(inum)
	if err != nil {
		return err
	}
	defer a.close()
	reader, err := ringbuf.NewReader(a.ring)
	if err != nil {
		return fmt.Errorf("drop: reading the ring: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = reader.Close() })
	defer func() {
		if stop() {
			_ = reader.Close()
		}
	}()
	ready()
	looked := time.Now()
	for {
		reader.SetDeadline(time.Now().Add(time.Second))
		rec, err := reader.Read()
		now := time.Now()
		if now.Sub(looked) >= time.Second || err != nil {
			a.tell(s, looked, now)
			looked = now
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			continue
		case errors.Is(err, ringbuf.ErrClosed):
			return nil
		case err != nil:
			return fmt.Errorf("drop: reading the ring: %w", err)
		case len(rec.RawSample) < rawLen:
			continue
		}
		b := a.record(rec.RawSample[:rawLen])
		if b == nil {
			continue // a socket of another family
		}
		s.tally.Events(1)
		s.tally.Frame(recordLen)
		emit(trace.Frame{Source: trace.Drops, Time: now.UnixNano(), Data: b})
	}
}

// record makes a Frame's record of what a program wrote, nil if there is no packet.
func (a *attached) record(raw []byte) []byte {
	ne := binary.NativeEndian
	b := append(make([]byte, 0, recordLen), raw[:nameAt]...)
	b = append(b, make([]byte, recordLen-nameAt)...)
	ne.PutUint64(b[8:], ne.Uint64(raw[8:])+a.boot)
	if ne.Uint64(raw)>>32 == kindResend {
		clear(b[packetAt:])
		if !segment(b[packetAt:deviceAt], raw) {
			return nil
		}
		return b
	}
	copy(b[nameAt:recordLen-1], a.functions.name(ne.Uint64(raw[placeAt:])))
	return b
}

// segment writes the headers that a socket's segment will have, as far as they are
// known.
func segment(ip, raw []byte) bool {
	const synSent, ack, syn = 2, 0x10, 0x02
	ne, be := binary.NativeEndian, binary.BigEndian
	src, dst := raw[sockAddr:sockPeerAddr], raw[sockPeerAddr:sockAddr6]
	src6, dst6 := raw[sockAddr6:sockPeer6], raw[sockPeer6:sockSeq]
	var tcp []byte
	switch family := ne.Uint16(raw[sockFamily:]); {
	case family == unix.AF_INET, family == unix.AF_INET6 && netip.AddrFrom16([16]byte(dst6)).Is4In6():
		ip[0], ip[9] = 0x45, unix.IPPROTO_TCP
		copy(ip[12:], src)
		copy(ip[16:], dst)
		tcp = ip[20:]
	case family == unix.AF_INET6:
		ip[0], ip[6] = 0x60, unix.IPPROTO_TCP
		copy(ip[8:], src6)
		copy(ip[24:], dst6)
		tcp = ip[40:]
	default:
		return false
	}
	be.PutUint16(tcp, ne.Uint16(raw[sockPort:]))
	copy(tcp[2:], raw[sockPeerPort:sockPeerPort+2])
	be.PutUint32(tcp[4:], ne.Uint32(raw[sockSeq:]))
	if tcp[12], tcp[13] = 5<<4, ack; raw[sockState] == synSent {
		tcp[13] = syn
	}
	return true
}

// namespace returns the number of the calling thread's network namespace.
func namespace() (uint32, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return 0, fmt.Errorf("drop: %w", err)
	}
	return uint32(st.Ino), nil
}

// attached are the programs at work.
type attached struct {
	ring, lost *ebpf.Map
	progs      []*ebpf.Program
	links      []link.Link
	functions  functions
	// boot is what the monotonic clock lacks of the wall's.
	boot uint64
	told uint64
}

func (a *attached) close() {
	for _, l := range a.links {
		_ = l.Close()
	}
	for _, p := range a.progs {
		_ = p.Close()
	}
	for _, m := range []*ebpf.Map{a.ring, a.lost} {
		if m != nil {
			_ = m.Close()
		}
	}
}

func (s *Source) attach(inum uint32) (_ *attached, err error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, fmt.Errorf("drop: this kernel does not describe itself (CONFIG_DEBUG_INFO_BTF): %w", err)
	}
	o, err := layout(spec)
	if err != nil {
		return nil, err
	}
	// This takes its time, and what is told meanwhile would be read late.
	a := &attached{functions: readFunctions()}
	defer func() {
		if err != nil {
			a.close()
		}
	}()
	refused := func(what string, err error) error {
		return fmt.Errorf("drop: the kernel refuses %s (needs CAP_BPF and CAP_PERFMON in the first user namespace): %w", what, err)
	}
	if a.ring, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: uint32(s.config.RingSize)}); err != nil {
		return nil, refused("a BPF ring", err)
	}
	if a.lost, err = ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1}); err != nil {
		return nil, refused("a BPF map", err)
	}
	so, err := sockLayout(spec)
	if err := a.run("kptrace_drop", "kfree_skb", program(&o, inum, a.ring, a.lost)); err != nil {
		return nil, refused("a BPF program at kfree_skb", err)
	}
	if err == nil {
		err = a.run("kptrace_resend", "tcp_retransmit_skb", resent(&o, &so, inum, a.ring, a.lost))
	}
	if err != nil { // drops are told without
		s.tally.Note("segments that are sent again are not told: " + refused("a BPF program at tcp_retransmit_skb", err).Error())
	}
	var mono unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono); err != nil {
		return nil, fmt.Errorf("drop: reading the clock: %w", err)
	}
	a.boot = uint64(time.Now().UnixNano() - mono.Nano())
	return a, nil
}

// run loads a program and attaches it at a tracepoint.
func (a *attached) run(name, at string, code asm.Instructions) error {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: name, Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: at,
		License: "Dual MIT/GPL", Instructions: code,
	})
	if err != nil {
		return err
	}
	a.progs = append(a.progs, prog)
	l, err := link.AttachTracing(link.TracingOptions{Program: prog})
	if err != nil {
		return err
	}
	a.links = append(a.links, l)
	return nil
}

// functions are the kernel's, by where they begin.
type functions struct {
	from  []uint64
	names []string
}

// readFunctions reads them from /proc/kallsyms, none where the kernel hides them.
func readFunctions() (f functions) {
	text, err := os.ReadFile("/proc/kallsyms")
	if err != nil {
		return f
	}
	type symbol struct {
		at   uint64
		name string
	}
	var all []symbol
	for line := range strings.Lines(string(text)) {
		w := strings.Fields(line)
		if len(w) < 3 || w[1] != "t" && w[1] != "T" {
			continue
		}
		if at, err := strconv.ParseUint(w[0], 16, 64); err == nil && at != 0 {
			all = append(all, symbol{at, strings.Clone(w[2])})
		}
	}
	slices.SortStableFunc(all, func(x, y symbol) int { return cmp.Compare(x.at, y.at) })
	for _, s := range all {
		f.from, f.names = append(f.from, s.at), append(f.names, s.name)
	}
	return f
}

// name is that of the function an address is in, empty if that is not known.
func (f *functions) name(at uint64) string {
	i, found := slices.BinarySearch(f.from, at)
	if !found {
		i--
	}
	if i < 0 || at == 0 {
		return ""
	}
	return f.names[i]
}

// tell reports records for which there was no room.
func (a *attached) tell(s *Source, from, to time.Time) {
	var n uint64
	if err := a.lost.Lookup(uint32(0), &n); err != nil || n == a.told {
		return
	}
	s.tally.Lose(from.UnixNano(), to.UnixNano(), n-a.told, "kernel")
	a.told = n
}

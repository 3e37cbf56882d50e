package drop

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/cilium/ebpf"
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
		case len(rec.RawSample) < recordLen:
			continue
		}
		b := rec.RawSample[:recordLen]
		binary.NativeEndian.PutUint64(b[8:], binary.NativeEndian.Uint64(b[8:])+a.boot)
		s.tally.Events(1)
		s.tally.Frame(recordLen)
		emit(trace.Frame{Source: trace.Drops, Time: now.UnixNano(), Data: b})
	}
}

// namespace returns the number of the calling thread's network namespace.
func namespace() (uint32, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return 0, fmt.Errorf("drop: %w", err)
	}
	return uint32(st.Ino), nil
}

// attached is the program at work.
type attached struct {
	ring, lost *ebpf.Map
	prog       *ebpf.Program
	link       link.Link
	// boot is what the monotonic clock lacks of the wall's.
	boot uint64
	told uint64
}

func (a *attached) close() {
	if a.link != nil {
		_ = a.link.Close()
	}
	if a.prog != nil {
		_ = a.prog.Close()
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
	a := &attached{}
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
	a.prog, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "kptrace_drop", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: "kfree_skb",
		License: "Dual MIT/GPL", Instructions: program(&o, inum, a.ring, a.lost),
	})
	if err != nil {
		return nil, refused("a BPF program at kfree_skb", err)
	}
	if a.link, err = link.AttachTracing(link.TracingOptions{Program: a.prog}); err != nil {
		return nil, refused("to attach at kfree_skb", err)
	}
	var mono unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono); err != nil {
		return nil, fmt.Errorf("drop: reading the clock: %w", err)
	}
	a.boot = uint64(time.Now().UnixNano() - mono.Nano())
	return a, nil
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

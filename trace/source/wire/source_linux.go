package wire

import (
	"context"
	"fmt"
	"net"
	"runtime"
	"time"

	"github.com/google/gopacket/pcapgo"
	"golang.org/x/net/bpf"

	"github.com/kptrace/kptrace/trace"
)

// rescan is how often devices that came and went are looked for.
const rescan = 2 * time.Second

// Run looks at the devices of the calling thread's network namespace until ctx
// ends. It calls ready when all there are at the start are open. It needs
// CAP_NET_RAW in the namespace. A device that cannot be opened, or breaks, is
// left out and named in the Stats.
func (s *Source) Run(ctx context.Context, ready func(), emit func(trace.Frame)) error {
	runtime.LockOSThread() // sockets are of the thread's namespace
	defer runtime.UnlockOSThread()
	prog, err := filter(s.config.Ports, s.config.AllPackets)
	if err != nil {
		return err
	}
	w := &watching{s: s, prog: prog, emit: emit, open: map[int]*pcapgo.EthernetHandle{}}
	defer w.close()
	if err := w.scan(); err != nil {
		return err
	}
	ready()
	tick := time.NewTicker(s.config.Tick)
	defer tick.Stop()
	scanned := time.Now()
	for {
		select {
		case <-ctx.Done():
			w.read()
			return nil
		case now := <-tick.C:
			w.read()
			if now.Sub(scanned) >= rescan {
				scanned = now
				if err := w.scan(); err != nil {
					return err
				}
			}
		}
	}
}

// watching is one Run.
type watching struct {
	s    *Source
	prog []bpf.RawInstruction
	emit func(trace.Frame)
	open map[int]*pcapgo.EthernetHandle
	buf  []byte
	last int64
}

func (w *watching) close() {
	for _, h := range w.open {
		h.Close()
	}
}

// scan opens devices that are new and closes those that are gone.
func (w *watching) scan() error {
	list, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("wire: listing devices: %w", err)
	}
	there := make(map[int]bool, len(list))
	left := 0
	var refused error
	for i := range list {
		dev := &list[i]
		if dev.Flags&net.FlagLoopback != 0 || dev.Flags&net.FlagUp == 0 {
			continue
		}
		there[dev.Index] = true
		switch {
		case w.open[dev.Index] != nil:
		case len(w.open) >= w.s.config.MaxDevices:
			left++
		default:
			h, err := w.openDevice(dev.Name)
			if err != nil {
				refused = err
				continue
			}
			w.open[dev.Index] = h
		}
	}
	for index, h := range w.open {
		if !there[index] {
			h.Close()
			delete(w.open, index)
		}
	}
	note := ""
	switch {
	case refused != nil && len(w.open) == 0:
		return refused
	case refused != nil:
		note = refused.Error()
	case left > 0:
		note = fmt.Sprintf("%d devices are left out, %d is the most", left, w.s.config.MaxDevices)
	}
	w.s.tally.Note(note)
	return nil
}

func (w *watching) openDevice(name string) (*pcapgo.EthernetHandle, error) {
	h, err := pcapgo.NewEthernetHandle(name)
	if err == nil {
		err = h.SetBPF(w.prog)
		if err == nil {
			err = h.SetCaptureLength(captureLen)
		}
		if err != nil {
			h.Close()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("wire: looking at device %s (needs CAP_NET_RAW): %w", name, err)
	}
	return h, nil
}

// read takes what the sockets hold. Reading one would block where nothing is
// there, so the kernel's count says how often.
func (w *watching) read() {
	now := time.Now().UnixNano()
	w.buf = w.buf[:0]
	var lost uint64
	for index, h := range w.open {
		st, err := h.Stats()
		if err != nil {
			continue
		}
		lost += uint64(st.Drops)
		for range st.Packets - st.Drops {
			packet, info, err := h.ZeroCopyReadPacketData()
			if err != nil {
				// The device went down: its socket is of no more use.
				h.Close()
				delete(w.open, index)
				break
			}
			w.s.tally.Events(1)
			w.buf = appendRecord(w.buf, uint32(info.InterfaceIndex), info.Timestamp.UnixNano(), packet)
		}
	}
	if lost > 0 {
		w.s.tally.Lose(w.last, now, lost, "kernel")
	}
	w.last = now
	if len(w.buf) > 0 {
		w.s.tally.Frame(len(w.buf))
		w.emit(trace.Frame{Source: trace.Wire, Time: now, Data: w.buf})
	}
}

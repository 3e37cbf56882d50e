package ctevent

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/trace"
)

// Run reads the events of the calling thread's network namespace until ctx
// ends. It calls ready when both groups are joined. It needs CAP_NET_ADMIN in
// the namespace and a kernel with CONFIG_NF_CONNTRACK_EVENTS.
func (s *Source) Run(ctx context.Context, ready func(), emit func(trace.Frame)) error {
	sock, err := nfnl.Open(s.config.ReceiveBuffer)
	if err != nil {
		return fmt.Errorf("ctevent: %w", err)
	}
	defer sock.Close()
	s.receiveBuffer.Store(int64(sock.ReceiveBuffer()))
	for _, group := range []int{nfnl.GroupConntrackNew, nfnl.GroupConntrackDestroy} {
		if err := sock.Join(group); err != nil {
			return fmt.Errorf("ctevent: listening to events (needs CAP_NET_ADMIN): %w", err)
		}
	}
	s.look(sock.ReceiveBuffer())
	ready()

	d := drops{sock: sock, since: time.Now().UnixNano(), report: s.lose}
	err = sock.Receive(ctx, nfnl.Handler{
		Tick: s.config.Tick,
		Data: func(data []byte, now int64) {
			var events uint64
			for m := nfnl.NewMessages(data); m.Next(); {
				events++
			}
			s.events.Add(events)
			s.frames.Add(1)
			s.bytes.Add(uint64(len(data)))
			emit(trace.Frame{Source: trace.Conntrack, Time: now, Data: data})
		},
		Overrun: func(now int64) {
			s.overruns.Add(1)
			d.read(now)
		},
		Idle: d.read,
	})
	d.read(time.Now().UnixNano())
	if err == nil {
		err = d.err
	}
	if err != nil {
		return fmt.Errorf("ctevent: reading events: %w", err)
	}
	return nil
}

func (s *Source) lose(l trace.Loss) {
	s.lost.Add(l.Events)
	s.config.OnLoss(l)
}

// look notes what will be missing here.
func (s *Source) look(granted int) {
	var notes []string
	if granted < s.config.ReceiveBuffer {
		notes = append(notes, fmt.Sprintf("receive buffer %d of %d bytes: not root of the machine, see net.core.rmem_max",
			granted, s.config.ReceiveBuffer))
	}
	mode, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_events")
	switch {
	case err != nil:
		notes = append(notes, "no events: this kernel has none, or conntrack is not loaded")
	case strings.TrimSpace(string(mode)) == "0":
		notes = append(notes, "no events: net.netfilter.nf_conntrack_events is 0")
	}
	note := strings.Join(notes, "; ")
	s.note.Store(&note)
}

// drops turns the kernel's count of events it could not deliver into losses.
type drops struct {
	sock   *nfnl.Socket
	seen   uint32
	since  int64
	report func(trace.Loss)
	err    error
}

// read reports what was dropped since the last read.
func (d *drops) read(now int64) {
	n, err := d.sock.Drops()
	if err != nil {
		d.err = err
		return
	}
	if lost := n - d.seen; lost != 0 {
		d.report(trace.Loss{Source: trace.Conntrack, From: d.since, To: now, Events: uint64(lost), Where: "kernel"})
	}
	d.seen, d.since, d.err = n, now, nil
}

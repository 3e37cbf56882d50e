package nftrace

import (
	"context"
	"fmt"
	"time"

	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/trace"
)

// tick is how long messages gather: a packet's come within microseconds.
const tick = 2 * time.Millisecond

// Run reads the traces of the calling thread's network namespace until ctx
// ends, and what the kernel sent until then. It calls ready when the group is
// joined. It needs CAP_NET_ADMIN in the namespace and Linux 4.6.
func (s *Source) Run(ctx context.Context, ready func(), emit func(trace.Frame)) error {
	sock, err := nfnl.Open(s.config.ReceiveBuffer)
	if err != nil {
		return fmt.Errorf("nftrace: %w", err)
	}
	defer sock.Close()
	s.receiveBuffer.Store(int64(sock.ReceiveBuffer()))
	if got := sock.ReceiveBuffer(); got < s.config.ReceiveBuffer {
		note := fmt.Sprintf("receive buffer %d of %d bytes: not root of the machine, see net.core.rmem_max", got, s.config.ReceiveBuffer)
		s.note.Store(&note)
	}
	if err := sock.Join(nfnl.GroupNFTrace); err != nil {
		return fmt.Errorf("nftrace: listening to traces (needs CAP_NET_ADMIN): %w", err)
	}
	ready()
	d := drops{sock: sock, since: time.Now().UnixNano(), report: s.lose}
	data := func(data []byte, now int64) {
		var events uint64
		for m := nfnl.NewMessages(data); m.Next(); {
			events++
		}
		s.events.Add(events)
		s.frames.Add(1)
		s.bytes.Add(uint64(len(data)))
		emit(trace.Frame{Source: trace.NFTrace, Time: now, Data: data})
	}
	err = sock.Receive(ctx, nfnl.Handler{
		Tick: tick,
		Data: data,
		Overrun: func(now int64) {
			s.overruns.Add(1)
			d.read(now)
		},
		Idle: d.read,
	})
	if err == nil { // what was sent before the end
		_, err = sock.Drain(func(b []byte) { data(b, time.Now().UnixNano()) })
	}
	d.read(time.Now().UnixNano())
	if err == nil {
		err = d.err
	}
	if err != nil {
		return fmt.Errorf("nftrace: reading traces: %w", err)
	}
	return nil
}

func (s *Source) lose(l trace.Loss) {
	s.lost.Add(l.Events)
	s.config.OnLoss(l)
}

// drops turns the kernel's count of messages it could not deliver into losses.
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
		d.report(trace.Loss{Source: trace.NFTrace, From: d.since, To: now, Events: uint64(lost), Where: "kernel"})
	}
	d.seen, d.since, d.err = n, now, nil
}

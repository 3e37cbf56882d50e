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
	s.tally.Note(s.tally.Buffer(sock.ReceiveBuffer(), s.config.ReceiveBuffer))
	if err := sock.Join(nfnl.GroupNFTrace); err != nil {
		return fmt.Errorf("nftrace: listening to traces (needs CAP_NET_ADMIN): %w", err)
	}
	ready()
	d := nfnl.Drops{Count: sock.Drops, Since: time.Now().UnixNano(), Report: func(from, to int64, n uint64) {
		s.tally.Lose(from, to, n, "kernel")
	}}
	data := func(data []byte, now int64) {
		s.tally.Events(nfnl.CountMessages(data))
		s.tally.Frame(len(data))
		emit(trace.Frame{Source: trace.NFTrace, Time: now, Data: data})
	}
	err = sock.Receive(ctx, nfnl.Handler{
		Tick: tick,
		Data: data,
		Overrun: func(now int64) {
			s.tally.Overrun()
			d.Look(now)
		},
		Idle: d.Look,
	})
	if err == nil { // what was sent before the end
		_, err = sock.Drain(func(b []byte) { data(b, time.Now().UnixNano()) })
	}
	d.Look(time.Now().UnixNano())
	if err == nil {
		err = d.Err()
	}
	if err != nil {
		return fmt.Errorf("nftrace: reading traces: %w", err)
	}
	return nil
}

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
	for _, group := range []int{nfnl.GroupConntrackNew, nfnl.GroupConntrackDestroy} {
		if err := sock.Join(group); err != nil {
			return fmt.Errorf("ctevent: listening to events (needs CAP_NET_ADMIN): %w", err)
		}
	}
	s.look(sock.ReceiveBuffer())
	ready()

	d := nfnl.Drops{Count: sock.Drops, Since: time.Now().UnixNano(), Report: func(from, to int64, n uint64) {
		s.tally.Lose(from, to, n, "kernel")
	}}
	err = sock.Receive(ctx, nfnl.Handler{
		Tick: s.config.Tick,
		Data: func(data []byte, now int64) {
			s.tally.Events(nfnl.CountMessages(data))
			s.tally.Frame(len(data))
			emit(trace.Frame{Source: trace.Conntrack, Time: now, Data: data})
		},
		Overrun: func(now int64) {
			s.tally.Overrun()
			d.Look(now)
		},
		Idle: d.Look,
	})
	d.Look(time.Now().UnixNano())
	if err == nil {
		err = d.Err()
	}
	if err != nil {
		return fmt.Errorf("ctevent: reading events: %w", err)
	}
	return nil
}

// look notes what will be missing here.
func (s *Source) look(granted int) {
	var notes []string
	if note := s.tally.Buffer(granted, s.config.ReceiveBuffer); note != "" {
		notes = append(notes, note)
	}
	mode, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_events")
	switch {
	case err != nil:
		notes = append(notes, "no events: this kernel has none, or conntrack is not loaded")
	case strings.TrimSpace(string(mode)) == "0":
		notes = append(notes, "no events: net.netfilter.nf_conntrack_events is 0")
	}
	s.tally.Note(strings.Join(notes, "; "))
}

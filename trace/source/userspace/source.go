// Package userspace is the source of what the userspace proxy does with each
// connection: picks, failed tries, answers, ends. The proxy hands its events to
// a callback that never waits; this Source writes them into a bounded buffer and
// counts what finds no room, so that a stalled tracer costs the proxy nothing.
package userspace

import (
	"context"
	"sync"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// Notifier is who tells of connections: a proxy.Relay.
type Notifier interface {
	Notify(func(*proxy.RelayEvent))
}

// Config says whose events to take. Relay must be set; all else has defaults.
type Config struct {
	Relay Notifier
	// Room is how many bytes of events may wait; zero means 8 MiB, which holds
	// some 50,000.
	Room int
	// Tick is how long events gather before they are passed on; zero means
	// 5 ms.
	Tick time.Duration
	// Lookup finds the rule that a tag stands for, as in the nflog source. It
	// is called by the Decoder. Nil knows no rule.
	Lookup func(tag []byte) *proxy.Rule
	// OnLoss is told of everything missed, from the goroutine of Run; it must
	// not block. Nil tells nobody; Stats counts in any case.
	OnLoss func(trace.Loss)
}

// Source takes a Relay's events. It implements trace.Source.
type Source struct {
	config  Config
	decoder *Decoder
	tally   *trace.Tally

	mu      sync.Mutex // protects what follows
	waiting []byte
	lost    uint64 // since the last look
	since   int64  // when the first of them was
}

var (
	_ trace.Source  = (*Source)(nil)
	_ trace.Decoder = (*Decoder)(nil)
)

// New returns a Source. It starts nothing.
func New(c Config) *Source {
	if c.Room == 0 {
		c.Room = 8 << 20
	}
	if c.Tick == 0 {
		c.Tick = 5 * time.Millisecond
	}
	s := &Source{config: c, decoder: NewDecoder(c.Lookup), tally: trace.NewTally(trace.Userspace, c.OnLoss)}
	s.tally.Buffer(c.Room, c.Room)
	return s
}

// ID returns trace.Userspace.
func (s *Source) ID() trace.SourceID { return trace.Userspace }

// Decoder returns the decoder of this Source's Frames, whose counts are part
// of Stats. It has one user at a time.
func (s *Source) Decoder() *Decoder { return s.decoder }

// Stats returns what was taken since New, over all Runs. Lost counts the events
// that found no room.
func (s *Source) Stats() trace.SourceStats {
	return s.tally.Stats(trace.SourceStats{Foreign: s.decoder.foreign.Load(), Damaged: s.decoder.damaged.Load()})
}

// Run takes events until ctx ends, which is no error.
func (s *Source) Run(ctx context.Context, ready func(), emit func(trace.Frame)) error {
	s.config.Relay.Notify(s.take)
	defer s.config.Relay.Notify(nil)
	ready()
	tick := time.NewTicker(s.config.Tick)
	defer tick.Stop()
	var spare []byte
	for done := false; !done; {
		select {
		case <-ctx.Done():
			done = true // once more, for the last ones
		case <-tick.C:
		}
		s.mu.Lock()
		data, lost, since := s.waiting, s.lost, s.since
		s.waiting, s.lost = spare[:0], 0
		s.mu.Unlock()
		spare = data
		now := time.Now().UnixNano()
		if lost > 0 {
			s.tally.Lose(since, now, lost, "queue")
		}
		if len(data) > 0 {
			s.tally.Frame(len(data))
			emit(trace.Frame{Source: trace.Userspace, Time: now, Data: data})
		}
	}
	return nil
}

// take keeps an event, from any goroutine.
func (s *Source) take(e *proxy.RelayEvent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tally.Events(1)
	if len(s.waiting)+maxEvent > s.config.Room {
		if s.lost == 0 {
			s.since = e.Time.UnixNano()
		}
		s.lost++
		return
	}
	s.waiting = appendEvent(s.waiting, e)
}

package ctevent

import (
	"time"

	"github.com/kptrace/kptrace/trace"
)

// Config says how to read. The zero value of every field is a good default.
type Config struct {
	// ReceiveBuffer is the socket's buffer in bytes; zero means 32 MiB, which
	// holds some 70,000 events. An ordinary user gets at most twice
	// net.core.rmem_max.
	ReceiveBuffer int
	// Tick is how long events gather in the socket before they are read; zero
	// means 5 ms.
	Tick time.Duration
	// OnLoss is told of everything missed, from the goroutine of Run; it must
	// not block. Nil tells nobody; Stats counts in any case.
	OnLoss func(trace.Loss)
}

// Source reads the events of one network namespace. It implements
// trace.Source. Its Frames hold netlink messages in the machine's byte order.
type Source struct {
	config  Config
	decoder *Decoder
	tally   *trace.Tally
}

var (
	_ trace.Source  = (*Source)(nil)
	_ trace.Decoder = (*Decoder)(nil)
)

// New returns a Source. It starts nothing.
func New(c Config) *Source {
	if c.ReceiveBuffer == 0 {
		c.ReceiveBuffer = 32 << 20
	}
	if c.Tick == 0 {
		c.Tick = 5 * time.Millisecond
	}
	return &Source{config: c, decoder: NewDecoder(), tally: trace.NewTally(trace.Conntrack, c.OnLoss)}
}

// ID returns trace.Conntrack.
func (s *Source) ID() trace.SourceID { return trace.Conntrack }

// Decoder returns the decoder of this Source's Frames, whose counts are part
// of Stats. It has one user at a time.
func (s *Source) Decoder() *Decoder { return s.decoder }

// Stats returns what was read since New, over all Runs. Events counts all
// that arrived and Lost those the kernel dropped; Foreign counts what the
// Decoder left out: other protocols than TCP, UDP and SCTP.
func (s *Source) Stats() trace.SourceStats {
	return s.tally.Stats(s.decoder.Stats())
}

package drop

import (
	"sync/atomic"

	"github.com/kptrace/kptrace/trace"
)

// Config says how to read. The zero value of every field is a good default.
type Config struct {
	// RingSize is the room for records in bytes, a power of two; zero means 1 MiB,
	// which holds 11,000.
	RingSize int
	// OnLoss is told of everything missed, from the goroutine of Run; it must
	// not block. Nil tells nobody; Stats counts in any case.
	OnLoss func(trace.Loss)
}

// Source reads the notices of one network namespace. It implements trace.Source.
type Source struct {
	config  Config
	decoder *Decoder

	frames, bytes, events, lost atomic.Uint64
}

var _ trace.Source = (*Source)(nil)

// New returns a Source. It starts nothing. Where the kernel does not name its
// reasons they are numbers.
func New(c Config) *Source {
	if c.RingSize == 0 {
		c.RingSize = 1 << 20
	}
	if c.OnLoss == nil {
		c.OnLoss = func(trace.Loss) {}
	}
	return &Source{config: c, decoder: NewDecoder(reasonNames())}
}

// ID returns trace.Drops.
func (s *Source) ID() trace.SourceID { return trace.Drops }

// Decoder returns the decoder of this Source's Frames, whose counts are part
// of Stats. It has one user at a time.
func (s *Source) Decoder() *Decoder { return s.decoder }

// Stats returns what was read since New, over all Runs.
func (s *Source) Stats() trace.SourceStats {
	d := s.decoder.Stats()
	return trace.SourceStats{
		Source: trace.Drops,
		Frames: s.frames.Load(), Bytes: s.bytes.Load(), Events: s.events.Load(), Lost: s.lost.Load(),
		Foreign: d.Foreign, Damaged: d.Damaged,
	}
}

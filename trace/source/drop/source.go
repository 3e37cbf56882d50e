package drop

import "github.com/kptrace/kptrace/trace"

// Config says how to read. The zero value of every field is a good default.
type Config struct {
	// RingSize is the room for records in bytes, a power of two; zero means 1 MiB,
	// which holds 10,000.
	RingSize int
	// OnLoss is told of everything missed, from the goroutine of Run; it must
	// not block. Nil tells nobody; Stats counts in any case.
	OnLoss func(trace.Loss)
}

// Source reads the notices of one network namespace. It implements trace.Source.
type Source struct {
	config  Config
	decoder *Decoder
	tally   *trace.Tally
}

var _ trace.Source = (*Source)(nil)

// New returns a Source. It starts nothing. Where the kernel does not name its
// reasons they are numbers.
func New(c Config) *Source {
	if c.RingSize == 0 {
		c.RingSize = 1 << 20
	}
	return &Source{config: c, decoder: NewDecoder(reasonNames()), tally: trace.NewTally(trace.Drops, c.OnLoss)}
}

// ID returns trace.Drops.
func (s *Source) ID() trace.SourceID { return trace.Drops }

// Decoder returns the decoder of this Source's Frames, whose counts are part
// of Stats. It has one user at a time.
func (s *Source) Decoder() *Decoder { return s.decoder }

// Stats returns what was read since New, over all Runs.
func (s *Source) Stats() trace.SourceStats {
	return s.tally.Stats(s.decoder.Stats())
}

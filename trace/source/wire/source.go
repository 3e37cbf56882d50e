package wire

import (
	"time"

	"github.com/kptrace/kptrace/trace"
)

// Config says what to look at. The zero value of every field is a good default.
type Config struct {
	// Ports are the ports, of Services and of endpoints, that packets must have on
	// either side; none, or more than 60, means all.
	Ports []uint16
	// AllPackets looks at all packets of TCP, not only at those with the SYN flag.
	AllPackets bool
	// MaxDevices bounds the devices; zero means 64. Those with low indexes come
	// first, which are the node's own.
	MaxDevices int
	// Tick is how often the sockets are looked at; zero means 5 ms.
	Tick time.Duration
	// OnLoss is told of everything missed, from the goroutine of Run; it must
	// not block. Nil tells nobody; Stats counts in any case.
	OnLoss func(trace.Loss)
}

// Source sees the devices of one network namespace, but for lo, which packets
// pass twice. It implements trace.Source.
type Source struct {
	config  Config
	decoder *Decoder
	tally   *trace.Tally
}

var _ trace.Source = (*Source)(nil)

// New returns a Source. It starts nothing.
func New(c Config) *Source {
	if c.MaxDevices == 0 {
		c.MaxDevices = 64
	}
	if c.Tick == 0 {
		c.Tick = 5 * time.Millisecond
	}
	return &Source{config: c, decoder: NewDecoder(), tally: trace.NewTally(trace.Wire, c.OnLoss)}
}

// ID returns trace.Wire.
func (s *Source) ID() trace.SourceID { return trace.Wire }

// Decoder returns the decoder of this Source's Frames, whose counts are part
// of Stats. It has one user at a time.
func (s *Source) Decoder() *Decoder { return s.decoder }

// Stats returns what was read since New, over all Runs.
func (s *Source) Stats() trace.SourceStats {
	return s.tally.Stats(s.decoder.Stats())
}

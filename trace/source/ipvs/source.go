package ipvs

import (
	"sync"
	"time"

	"github.com/kptrace/kptrace/trace"
)

const (
	// leastInterval is how often the kernel itself brings statistics up to
	// date.
	leastInterval = 2 * time.Second
	// share bounds the cost: after a poll the pause is so many times as long.
	share = 20
	// mostBytes bounds how much of a table is read: some 12,000 connections.
	mostBytes = 1 << 20
)

// Config says how to sample. The zero value of every field is a good default.
type Config struct {
	// Interval is the time between two polls; less than two seconds, and zero,
	// means two seconds. A poll that takes long makes the next one later.
	Interval time.Duration
	// Proc is where proc is mounted; empty means /proc.
	Proc string
}

// Source samples the IPVS of one network namespace. It implements
// trace.Source. Its Frames hold text.
type Source struct {
	config  Config
	decoder *Decoder

	tally *trace.Tally

	mu      sync.Mutex
	servers []trace.VirtualServer
	seen    map[counterKey]counter

	bound map[counterKey]int // by the last poll; Run's own
}

var (
	_ trace.Source  = (*Source)(nil)
	_ trace.Decoder = (*Decoder)(nil)
)

// New returns a Source. It starts nothing.
func New(c Config) *Source {
	c.Interval = max(c.Interval, leastInterval)
	if c.Proc == "" {
		c.Proc = "/proc"
	}
	return &Source{config: c, decoder: NewDecoder(), tally: trace.NewTally(trace.IPVS, nil), seen: map[counterKey]counter{}}
}

// ID returns trace.IPVS.
func (s *Source) ID() trace.SourceID { return trace.IPVS }

// Decoder returns the decoder of this Source's Frames, whose counts are part
// of Stats. It has one user at a time.
func (s *Source) Decoder() *Decoder { return s.decoder }

// Stats returns what was read since New, over all Runs. Nothing is ever lost:
// a sample is no report.
func (s *Source) Stats() trace.SourceStats {
	d := s.decoder.Stats()
	st := s.tally.Stats(trace.SourceStats{Foreign: d.Foreign, Damaged: d.Damaged})
	st.Events = d.Events
	return st
}

// Servers returns the virtual servers as of the last poll, with statistics, by
// address. The slices must not be changed. It may be called from anywhere.
func (s *Source) Servers() []trace.VirtualServer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.servers
}

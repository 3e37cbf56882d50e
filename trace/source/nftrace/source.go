package nftrace

import "github.com/kptrace/kptrace/trace"

// Config says how to read. The zero value of every field is a good default.
type Config struct {
	// ReceiveBuffer is the socket's buffer in bytes; zero means 256 MiB, which holds
	// 200,000 messages, or what the SYN and SYN-ACK of 3,300 connections bring while
	// nobody reads. The kernel uses of it what has not been read. An ordinary user
	// gets at most twice net.core.rmem_max.
	ReceiveBuffer int
	// OnLoss is told of everything missed, from the goroutine of Run; it must
	// not block. Nil tells nobody; Stats counts in any case.
	OnLoss func(trace.Loss)
}

// Source reads the traces of one network namespace. It implements
// trace.Source. Its Frames hold netlink messages in the machine's byte order.
type Source struct {
	config  Config
	decoder *Decoder
	tally   *trace.Tally
}

var _ trace.Source = (*Source)(nil)

// New returns a Source. It starts nothing.
func New(c Config) *Source {
	if c.ReceiveBuffer == 0 {
		c.ReceiveBuffer = 256 << 20
	}
	return &Source{config: c, decoder: NewDecoder(), tally: trace.NewTally(trace.NFTrace, c.OnLoss)}
}

// ID returns trace.NFTrace.
func (s *Source) ID() trace.SourceID { return trace.NFTrace }

// Decoder returns the decoder of this Source's Frames, whose counts are part
// of Stats. It has one user at a time.
func (s *Source) Decoder() *Decoder { return s.decoder }

// Stats returns what was read since New, over all Runs. Events counts the
// messages that arrived and Lost those the kernel dropped; together they are
// what it sent.
func (s *Source) Stats() trace.SourceStats {
	return s.tally.Stats(s.decoder.Stats())
}

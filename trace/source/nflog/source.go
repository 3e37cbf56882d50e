package nflog

import (
	"fmt"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// DefaultGroup is the NFLOG group kptrace's rules use where nobody says
// otherwise.
const DefaultGroup = 100

// Config says which group to read and how. The zero value of every field is a
// good default.
type Config struct {
	// Group is the NFLOG group. Zero means DefaultGroup: the kernel's group 0
	// belongs to whoever logs without choosing.
	Group uint16
	// CopyRange is how many bytes of each packet are copied, from the IP
	// header on. Zero means 128: an IPv6 header, an ICMPv6 error, the IPv6
	// header it quotes and 20 bytes of TCP take 108.
	CopyRange uint32
	// QThresh is how many events the kernel gathers before it sends them
	// (zero means 32), and Timeout how long the first of them may wait, in
	// steps of 10 ms (zero means 10 ms). The kernel's own default is a second.
	QThresh uint32
	Timeout time.Duration
	// NLBufSize is the room the kernel sets aside for that, in bytes, between
	// 4 and 128 KiB. Zero means 16 KiB, which QThresh events of CopyRange
	// bytes fit in.
	NLBufSize uint32
	// ReceiveBuffer is the socket's buffer in bytes; zero means 16 MiB. An
	// ordinary user gets at most twice net.core.rmem_max.
	ReceiveBuffer int
	// Tick is how long events gather in the socket before they are read; zero
	// means 5 ms.
	Tick time.Duration
	// Lookup finds the rule of a prefix, which it must not keep: usually
	// proxy.Index.Lookup of the newest index that knows it. It is called by
	// the Source's Decoder. Nil knows no rule.
	Lookup func(prefix []byte) *proxy.Rule
	// OnLoss is told of everything missed, from the goroutine of Run; it must
	// not block. Nil tells nobody; Stats counts in any case.
	OnLoss func(trace.Loss)
}

func (c Config) withDefaults() Config {
	def(&c.Group, DefaultGroup)
	def(&c.CopyRange, 128)
	def(&c.QThresh, 32)
	def(&c.Timeout, 10*time.Millisecond)
	def(&c.NLBufSize, 16<<10)
	def(&c.ReceiveBuffer, 16<<20)
	def(&c.Tick, 5*time.Millisecond)
	return c
}

func def[T comparable](p *T, value T) {
	var zero T
	if *p == zero {
		*p = value
	}
}

// Source reads one NFLOG group of one network namespace. It implements
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
	return &Source{config: c.withDefaults(), decoder: NewDecoder(c.Lookup), tally: trace.NewTally(trace.NFLog, c.OnLoss)}
}

// ID returns trace.NFLog.
func (s *Source) ID() trace.SourceID { return trace.NFLog }

// Decoder returns the decoder of this Source's Frames, whose counts are part
// of Stats. It has one user at a time.
func (s *Source) Decoder() *Decoder { return s.decoder }

// Stats returns what was read since New, over all Runs. Events counts all
// reports that arrived, Lost those the kernel numbered and could not deliver;
// Foreign and Damaged are counted as the Decoder meets them.
func (s *Source) Stats() trace.SourceStats {
	return s.tally.Stats(s.decoder.Stats())
}

// HeldError says that another program listens to the group.
type HeldError struct {
	Group uint16
	// PortID is the holder's netlink address. PID and Command name its
	// process where we may see it, else they are zero.
	PortID  uint32
	PID     int
	Command string
	// Err is the kernel's answer.
	Err error
}

// Error names the group, its holder and the way out.
func (e *HeldError) Error() string {
	who := fmt.Sprintf("another program (netlink port %d)", e.PortID)
	if e.PID != 0 {
		who = fmt.Sprintf("%s (pid %d)", e.Command, e.PID)
	}
	return fmt.Sprintf("nflog: group %d is held by %s: choose another group", e.Group, who)
}

// Unwrap returns the kernel's answer.
func (e *HeldError) Unwrap() error { return e.Err }

package otlp

import (
	"encoding/binary"
	"math"
	"time"

	"github.com/kptrace/kptrace/trace"
)

// Sampling says which connections are exported as spans. All of a connection is
// known when it is decided about, so what is worth looking at is always there.
type Sampling struct {
	// Never switches spans off.
	Never bool
	// Ratio of all connections is exported, from 0 to 1. Which ones follows
	// from the trace id, as OpenTelemetry's own ratio sampler decides.
	Ratio float64
	// Slow is the time to establish from which on a connection is exported in
	// any case; zero means none is slow.
	Slow time.Duration
}

// Keep reports whether a completed Flow is exported: it is one of the Ratio, it
// failed, was tried again, was slow to establish, or belongs to an
// application's trace that is recorded. It is a pure function of the Flow, so
// that others can tell which traces exist.
func (s Sampling) Keep(f *trace.Flow) bool {
	if s.Never {
		return false
	}
	if f.Outcome.Failed() || f.Retried() || s.Slow > 0 && f.Established >= s.Slow {
		return true
	}
	for i := range f.Attempts {
		if f.Attempts[i].Retransmits > 0 {
			return true
		}
	}
	if _, joined := f.Parent(); joined {
		return true
	}
	id := f.TraceID()
	return binary.BigEndian.Uint64(id[8:])>>1 < s.bound()
}

func (s Sampling) bound() uint64 {
	if s.Ratio >= 1 {
		return math.MaxUint64
	}
	return uint64(max(0, s.Ratio) * (1 << 63))
}

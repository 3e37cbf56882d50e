package otlp

import (
	"sync"
	"sync/atomic"
	"time"
)

// Stats is what an Exporter has done since it was made.
type Stats struct {
	// Traces and Logs are nil where a signal is off.
	Traces, Logs *SignalStats
	// Overrun counts updates of connections that were published faster than
	// the Exporter read them; they were lost before it saw them.
	Overrun uint64
}

// SignalStats counts connections, and nothing is counted twice:
//
//	Seen = Unsampled + Dropped + Queued + InFlight + Sent + Failed
type SignalStats struct {
	// Endpoint is where they go, as far as a flag said it, Protocol how.
	Endpoint, Protocol string
	// Seen ended while the Exporter ran; Unsampled of them were left out by
	// Sampling; Dropped found the queue full; Queued wait, of at most Capacity;
	// InFlight are in a request; Sent were taken by the collector; Failed were
	// refused, given up, or left over at the end.
	Seen, Unsampled, Dropped, Queued, Capacity, InFlight, Sent, Failed uint64
	// Items counts spans or log records sent, and Rejected those of them that
	// the collector took and said that it will not keep.
	Items, Rejected uint64
	// Requests were answered, Retries is how many were tried again.
	Requests, Retries uint64
	// LastError is why the newest request failed, at LastErrorAt; it stays when
	// things are well again. Failing is since when nothing has been sent
	// because of it, zero if all is well.
	LastError            string
	LastErrorAt, Failing time.Time
}

// counters are the numbers behind SignalStats.
type counters struct {
	seen, unsampled, dropped, inFlight, sent, failed atomic.Uint64
	items, rejected, requests, retries               atomic.Uint64

	mu            sync.Mutex // guards all below
	err           string
	errAt, broken time.Time
}

// failure notes an error and reports whether all was well before.
func (c *counters) failure(err error, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err, c.errAt = err.Error(), now
	first := c.broken.IsZero()
	if first {
		c.broken = now
	}
	return first
}

// success notes that a request was taken and returns since when none had been,
// zero if the one before was.
func (c *counters) success() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.broken
	c.broken = time.Time{}
	return was
}

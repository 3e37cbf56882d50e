// Package load opens and closes TCP connections as fast as it can, or at a
// given rate, with as little work of its own as possible: one thread, one
// epoll, no goroutine per connection. It measures what a new connection costs
// the kernel between client and server, so the benchmark uses it at both
// ends.
//
// On each connection the client sends a short HTTP request, the server a
// short answer and closes, then the client closes. The port that is left in
// TIME_WAIT is the server's, so that clients do not run out of theirs.
package load

import (
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Config says what Run does.
type Config struct {
	// Target is where to connect, an IPv4 address.
	Target netip.AddrPort
	// Conns ends the run after so many connections, and Duration after that
	// time; zero means no such limit, but not both.
	Conns    int
	Duration time.Duration
	// Concurrency is how many connections are open at once; 32 if zero.
	Concurrency int
	// Rate is connections per second to begin at most; zero means no limit.
	Rate float64
	// Patience is how long one connection may take in all; 5 s if zero.
	Patience time.Duration
	// Each is told of every connection that was answered and closed, on Run's
	// thread; nil tells nobody and saves a system call for each.
	Each func(Conn)
}

// Conn is one connection that was answered and closed.
type Conn struct {
	// Local is the client's end, Server who answered, in the server's words:
	// the address and port it listens at.
	Local, Server netip.AddrPort
	Began         time.Time
}

// Result is what a run came to.
type Result struct {
	// Done counts connections that were answered and closed, Errors all
	// others, by what went wrong.
	Done   int            `json:"done"`
	Errors map[string]int `json:"errors,omitempty"`
	// Elapsed is from the first connect to the last close, PerSecond is Done
	// by it.
	Elapsed   time.Duration `json:"elapsedNs"`
	PerSecond float64       `json:"perSecond"`
	// P50 and P99 are times from connect to close.
	P50 time.Duration `json:"p50Ns"`
	P99 time.Duration `json:"p99Ns"`
}

// Failed is the number of connections that failed.
func (r *Result) Failed() int {
	n := 0
	for _, c := range r.Errors {
		n += c
	}
	return n
}

// String returns the result in one line.
func (r *Result) String() string {
	s := fmt.Sprintf("%d connections in %.2f s: %.0f/s, p50 %v, p99 %v", r.Done, r.Elapsed.Seconds(), r.PerSecond,
		r.P50.Round(time.Microsecond), r.P99.Round(time.Microsecond))
	for what, n := range r.Errors {
		s += fmt.Sprintf(", %d %s", n, what)
	}
	return s
}

// finish fills in what follows from the rest.
func (r *Result) finish(took []time.Duration, elapsed time.Duration) {
	r.Elapsed = elapsed
	if elapsed > 0 {
		r.PerSecond = float64(r.Done) / elapsed.Seconds()
	}
	if len(took) > 0 {
		slices.Sort(took)
		r.P50, r.P99 = took[(len(took)-1)/2], took[(len(took)-1)*99/100]
	}
}

func (c *Config) defaults() error {
	if !c.Target.Addr().Is4() || c.Target.Port() == 0 {
		return fmt.Errorf("load: target %q is not an IPv4 address and port", c.Target)
	}
	if c.Conns <= 0 && c.Duration <= 0 {
		return fmt.Errorf("load: say when to end: after how many connections or what time")
	}
	if c.Concurrency <= 0 {
		c.Concurrency = 32
	}
	if c.Patience <= 0 {
		c.Patience = 5 * time.Second
	}
	return nil
}

package selection

import (
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
)

// Config says how to select. The zero value of every field but Flavour is a good
// default.
type Config struct {
	Tools   xtables.Tools
	Flavour xtables.Flavour
	// IPv6 selects packets of IPv6 too.
	IPv6 bool
	// Timeout is how long entries live unless refreshed, in whole seconds; zero
	// means 15 s.
	Timeout time.Duration
	// Rate is how many packets a second are traced at most, once Burst more than
	// that were; zero means 1,000 and 10,000. Some 25 reports come of a packet,
	// each of which takes the kernel 2 µs.
	Rate, Burst int
}

// maxEntries bounds a set: the kernel's default.
const maxEntries = 65536

func (c Config) withDefaults() Config {
	if c.Timeout == 0 {
		c.Timeout = 15 * time.Second
	}
	if c.Rate == 0 {
		c.Rate = 1000
	}
	if c.Burst == 0 {
		c.Burst = 10_000
	}
	return c
}

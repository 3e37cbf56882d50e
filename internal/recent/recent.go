// Package recent reads the lists in which xt_recent keeps clients, as a kube-proxy
// in iptables mode does for session affinity.
package recent

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Slack is by how much an Entry's time may be wrong: the kernel keeps it in ticks
// since the machine started, and when these began is known to less than that.
const Slack = time.Second

// Entry is one client in a list.
type Entry struct {
	Client netip.Addr
	// Last is when it was seen last.
	Last time.Time
}

// clock tells the time of a tick.
type clock struct {
	now time.Time
	// ticks is the kernel's count now, and tick how long one is.
	ticks uint64
	tick  time.Duration
}

// at is the time of a count. One of the future, by the clock's error, is now.
func (c *clock) at(ticks uint64) time.Time {
	if ticks >= c.ticks {
		return c.now
	}
	return c.now.Add(-time.Duration(c.ticks-ticks) * c.tick)
}

// parse reads a list, oldest entry first (net/netfilter/xt_recent.c: src=ADDR ttl: N
// last_seen: TICKS oldest_pkt: N TICKS, …).
func parse(text string, c *clock) (out []Entry) {
	for line := range strings.Lines(text) {
		addr, rest, _ := strings.Cut(strings.TrimPrefix(line, "src="), " ")
		a, err := netip.ParseAddr(addr)
		if err != nil {
			continue
		}
		_, rest, _ = strings.Cut(rest, "last_seen: ")
		number, _, _ := strings.Cut(rest, " ")
		ticks, err := strconv.ParseUint(number, 10, 64)
		if err != nil {
			continue
		}
		out = append(out, Entry{a, c.at(ticks)})
	}
	slices.SortStableFunc(out, func(a, b Entry) int { return a.Last.Compare(b.Last) })
	return out
}

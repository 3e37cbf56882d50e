package nflog

import (
	"time"

	"github.com/kptrace/kptrace/internal/nfnl"
)

// tailWait is how long after an overrun the next event may take to show, by
// its number, how many are missing.
const tailWait = int64(time.Second)

// counter finds losses in the numbers the kernel gives a group's events: from
// 0 at the bind, one by one, whether or not an event can be delivered.
type counter struct {
	next uint32
	// last is when the latest event was read.
	last int64
	// overrun is when the socket reported an overrun that no gap has
	// explained yet, zero if none; assumed is how many events were reported
	// lost without a gap to prove it.
	overrun int64
	assumed uint64
	report  func(from, to int64, events uint64)
}

// frame counts the events in data and reports the gaps between them.
func (c *counter) frame(data []byte, now int64) (events uint64) {
	for m := nfnl.NewMessages(data); m.Next(); {
		if m.Type != typePacket {
			continue
		}
		events++
		for a := m.Attrs(); a.Next(); {
			if a.Type == attrSeq {
				c.seq(a.Uint32(), now)
				break
			}
		}
	}
	return events
}

func (c *counter) seq(seq uint32, now int64) {
	// A number that stands still or goes back starts a new count.
	if gap := seq - c.next; gap != 0 && gap < 1<<31 {
		c.gap(uint64(gap), now)
	}
	c.next, c.last = seq+1, now
}

// gap reports n lost events, of which some may have been reported already.
func (c *counter) gap(n uint64, now int64) {
	known := min(n, c.assumed)
	c.assumed, c.overrun = 0, 0
	if n > known {
		c.tell(n-known, now)
	}
}

func (c *counter) tell(n uint64, now int64) {
	c.report(c.last, now, n)
}

// overran notes that the socket overran.
func (c *counter) overran(now int64) {
	if c.overrun == 0 {
		c.overrun = now
	}
}

// idle reports an overrun that no event has explained for a second. How many
// events it cost shows with the next one; until then it counts as one.
func (c *counter) idle(now int64) {
	if c.overrun == 0 || now-c.overrun < tailWait {
		return
	}
	c.overrun = 0
	c.assumed++
	c.tell(1, now)
}

package correlate

import (
	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// maxCarried bounds the requests that wait for the decision of their
// connection.
const maxCarried = 1024

// carried is a request that came before the decision of its connection was
// read: the reports of decisions are batched, those of requests are not.
type carried struct {
	tuple conntrack.Tuple
	trace.Carried
}

// Carried notes a request that named the span which sent it; t is the original
// tuple of its connection.
func (c *Correlator) Carried(t conntrack.Tuple, q trace.Carried) {
	at := q.Time.UnixNano()
	c.begun(at)
	if r := latest(c.find(t)); r != nil && r.picked && at >= r.start-stampSlack &&
		(r.phase == pending || r.phase == open || r.phase == closing && at <= r.endAt) {
		c.carry(r, q)
		c.later(r)
		if r.phase != free {
			c.arm(r)
		}
		return
	}
	if len(c.carried) == maxCarried {
		c.dropCarried(1)
	}
	c.carried = append(c.carried, carried{t, q})
}

// carry adds a request to a flow.
func (c *Correlator) carry(r *rec, q trace.Carried) {
	c.stats.carried.Add(1)
	f := c.edit(r)
	if len(f.Carried) == trace.MaxCarried {
		f.CarriedMore++
		return
	}
	// Earlier updates share the array, but not this length of it.
	f.Carried = append(f.Carried, q)
}

// claim gives a connection that has just been decided the requests that waited
// for it.
func (c *Correlator) claim(r *rec) {
	kept := c.carried[:0]
	for _, q := range c.carried {
		if q.tuple == r.orig && q.Time.UnixNano() >= r.start-stampSlack {
			c.carry(r, q.Carried)
		} else {
			kept = append(kept, q)
		}
	}
	c.carried = kept
}

// expireCarried drops requests that came before a time and found nothing.
func (c *Correlator) expireCarried(before int64) {
	n := 0
	for n < len(c.carried) && c.carried[n].Time.UnixNano() < before {
		n++
	}
	c.dropCarried(n)
}

func (c *Correlator) dropCarried(n int) {
	c.stats.carriedLate.Add(uint64(n))
	c.carried = append(c.carried[:0], c.carried[n:]...)
}

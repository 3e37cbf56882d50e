package correlate

import (
	"slices"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// earlyEvents keeps packets whose flow cannot be told yet, first in first out,
// with a list per tuple.
type earlyEvents struct {
	ring       []earlyEvent
	head, tail uint64 // positions; the ring holds tail-head events
	live       int
	keys       map[conntrack.Tuple]earlyKey
	scratch    []earlyEvent
}

type earlyEvent struct {
	e    trace.Event
	key  conntrack.Tuple
	seq  uint64
	next uint64 // position + 1 of the next event of this key, 0 for none
	done bool
}

type earlyKey struct{ first, last uint64 }

// keep puts a packet aside until it is known whose it is, for twice the hold:
// the entry that tells waits for its pick for one.
func (c *Correlator) keep(e *trace.Event, key conntrack.Tuple) {
	x := &c.early
	if x.keys == nil {
		x.keys = make(map[conntrack.Tuple]earlyKey)
	}
	if x.tail-x.head == maxHeld {
		c.expireFirst()
	}
	if n := uint64(len(x.ring)); x.tail-x.head == n {
		grown := make([]earlyEvent, max(64, n*2))
		for i := x.head; i < x.tail; i++ {
			grown[i%uint64(len(grown))] = x.ring[i%n]
		}
		x.ring = grown
	}
	at := x.tail
	x.tail++
	*x.at(at) = earlyEvent{e: *e, key: key, seq: at}
	k, ok := x.keys[key]
	if ok {
		x.at(k.last).next = at + 1
		k.last = at
	} else {
		k = earlyKey{at, at}
	}
	x.keys[key] = k
	x.live++
}

func (x *earlyEvents) at(i uint64) *earlyEvent { return &x.ring[i%uint64(len(x.ring))] }

// take appends the events kept for a key in a span of positions to the scratch
// list and forgets them.
func (x *earlyEvents) take(key conntrack.Tuple, from, until uint64) {
	k, ok := x.keys[key]
	if !ok {
		return
	}
	left := earlyKey{}
	var before *earlyEvent
	for i := k.first + 1; i != 0; {
		at := i - 1
		h := x.at(at)
		i = h.next
		if at >= from && (until == 0 || at < until) {
			x.scratch = append(x.scratch, *h)
			h.done = true
			x.live--
			continue
		}
		if h.next = 0; before == nil {
			left.first = at
		} else {
			before.next = at + 1
		}
		before, left.last = h, at
	}
	if before == nil {
		delete(x.keys, key)
	} else {
		x.keys[key] = left
	}
}

// release applies what was kept for r in the order it came.
func (c *Correlator) release(r *rec) {
	x := &c.early
	if x.live == 0 {
		return
	}
	x.scratch = x.scratch[:0]
	x.take(r.orig, r.keptFrom, r.keptUntil)
	if !r.reply.IsZero() {
		x.take(r.reply, r.keptFrom, r.keptUntil)
	}
	if len(x.scratch) > 1 {
		slices.SortFunc(x.scratch, func(a, b earlyEvent) int { return int(int64(a.seq - b.seq)) })
	}
	orig := r.orig
	for i := range x.scratch {
		if r.phase == free || r.orig != orig {
			c.stats.late.Add(1)
			continue
		}
		h := &x.scratch[i]
		if h.e.Time < r.keptSince {
			c.stats.late.Add(1)
			continue
		}
		c.apply(r, &h.e, h.key != orig)
	}
	x.scratch = x.scratch[:0]
}

// expireEarly decides about the packets that came up to the given time.
func (c *Correlator) expireEarly(until int64) {
	x := &c.early
	for x.head < x.tail {
		if h := x.at(x.head); !h.done && h.e.Time > until {
			return
		}
		c.expireFirst()
	}
}

// expireFirst decides about the packet that waits longest.
func (c *Correlator) expireFirst() {
	x := &c.early
	h := x.at(x.head)
	x.head++
	if h.done {
		return
	}
	h.done = true
	x.live--
	if h.next == 0 {
		delete(x.keys, h.key)
	} else {
		k := x.keys[h.key]
		k.first = h.next - 1
		x.keys[h.key] = k
	}
	e := h.e
	for r := latest(c.find(h.key)); r != nil; r = r.older {
		if h.seq >= r.keptFrom && (r.keptUntil == 0 || h.seq < r.keptUntil) {
			c.apply(r, &e, false)
			return
		}
	}
	c.stats.foreign.Add(1)
}

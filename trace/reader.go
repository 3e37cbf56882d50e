package trace

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
)

// ErrClosed is what a Reader returns when its Ring or the Reader itself is
// closed and everything was read.
var ErrClosed = errors.New("trace: ring closed")

// maxBatch bounds what one Next returns.
const maxBatch = 1024

// Reader is one place in a Ring. Next belongs to one goroutine; Close may be
// called from any.
type Reader struct {
	ring *Ring
	// next is the number of the Flow to be read next.
	next   uint64
	batch  []*Flow
	direct bool
	closed atomic.Bool

	// waiting says that Next sleeps or is about to; wakeup ends its sleep.
	waiting atomic.Bool
	wakeup  chan struct{}

	mu     sync.Mutex // guards losses
	losses []Loss
}

// WithDirect has the Reader get connections past Services too. Call it before the
// first Next.
func (r *Reader) WithDirect() *Reader {
	r.direct = true
	return r
}

// Next waits for Flows and returns those there are, oldest first, at most 1024
// at a time, and how many were overrun before the first of them. It returns
// with no Flows when only a Loss has come; see Losses. The slice is valid
// until the next call.
//
// The error is ctx's, or ErrClosed when all is read.
func (r *Reader) Next(ctx context.Context) ([]*Flow, uint64, error) {
	for {
		if flows, lost := r.Poll(); len(flows) > 0 || lost > 0 {
			return flows, lost, nil
		}
		r.waiting.Store(true)
		// Whatever was published before waiting was set nudged nobody: look
		// once more before going to sleep.
		switch {
		case r.ready() || r.hasLoss():
			r.waiting.Store(false)
			if flows, lost := r.Poll(); len(flows) > 0 || lost > 0 || r.hasLoss() {
				return flows, lost, nil
			}
			continue
		case r.closed.Load() || r.ring.closed.Load():
			r.waiting.Store(false)
			return nil, 0, ErrClosed
		}
		select {
		case <-ctx.Done():
			r.waiting.Store(false)
			return nil, 0, ctx.Err()
		case <-r.wakeup:
			r.waiting.Store(false)
		}
	}
}

// Poll is Next without waiting: it returns nothing when there is nothing.
func (r *Reader) Poll() ([]*Flow, uint64) {
	clear(r.batch)
	r.batch = r.batch[:0]
	var lost uint64
	for len(r.batch) < maxBatch {
		head := r.ring.head.Load()
		if r.next >= head {
			break
		}
		if size := uint64(len(r.ring.slots)); head-r.next > size {
			if len(r.batch) > 0 {
				break // lost counts what is missing before the first
			}
			lost += head - size - r.next
			r.next = head - size
		}
		s := r.ring.slots[r.next&r.ring.mask].Load()
		if s == nil || s.seq < r.next {
			break // numbered, but not yet in its place
		}
		if s.seq > r.next {
			continue // overrun since head was read: count it above
		}
		if r.direct || !s.flow.Direct() {
			r.batch = append(r.batch, s.flow)
		}
		r.next++
	}
	return r.batch, lost
}

// Losses returns what was lost since the last call, summed up by source and
// place, nil if nothing was.
func (r *Reader) Losses() []Loss {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.losses
	r.losses = nil
	return l
}

// Close gives the Reader's place back. Next then returns ErrClosed.
func (r *Reader) Close() {
	r.closed.Store(true)
	r.ring.change(func(list []*Reader) []*Reader {
		return slices.DeleteFunc(list, func(o *Reader) bool { return o == r })
	})
	r.nudge()
}

// ready reports whether the next Flow, or a later one, is in its place.
func (r *Reader) ready() bool {
	if r.closed.Load() || r.next >= r.ring.head.Load() {
		return false
	}
	s := r.ring.slots[r.next&r.ring.mask].Load()
	return s != nil && s.seq >= r.next
}

func (r *Reader) hasLoss() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.losses) > 0
}

func (r *Reader) addLoss(l Loss) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.losses = MergeLoss(r.losses, l)
}

func (r *Reader) nudge() {
	select {
	case r.wakeup <- struct{}{}:
	default:
	}
}

// MergeLoss adds l to the entry of losses with the same source and place, or
// appends it, and returns the list.
func MergeLoss(losses []Loss, l Loss) []Loss {
	for i := range losses {
		if have := &losses[i]; have.Source == l.Source && have.Where == l.Where {
			have.From, have.To = min(have.From, l.From), max(have.To, l.To)
			have.Events += l.Events
			return losses
		}
	}
	return append(losses, l)
}

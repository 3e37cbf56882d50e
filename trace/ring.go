package trace

import (
	"sync"
	"sync/atomic"
)

// Ring carries Flows from whoever makes them to any number of Readers. It
// holds the newest Flows and forgets the oldest: a slow Reader loses Flows,
// and learns exactly how many, but never delays a writer. Publish takes no
// lock and never waits, whatever Readers do.
type Ring struct {
	slots []atomic.Pointer[slot]
	mask  uint64
	// head is the number of Flows published so far; Flow n lives in slot
	// n&mask until Flow n+len(slots) takes its place.
	head   atomic.Uint64
	closed atomic.Bool

	mu sync.Mutex // guards changes of readers
	// readers is replaced as a whole, so that writers can go through it
	// without a lock.
	readers atomic.Pointer[[]*Reader]
}

// slot is one published Flow with its number. It is immutable, so a Reader
// that gets hold of one knows which Flow it has.
type slot struct {
	seq  uint64
	flow *Flow
}

// NewRing makes a ring of at least size Flows, rounded up to a power of two.
func NewRing(size int) *Ring {
	n := 1
	for n < size {
		n *= 2
	}
	r := &Ring{slots: make([]atomic.Pointer[slot], n), mask: uint64(n - 1)}
	r.readers.Store(&[]*Reader{})
	return r
}

// Publish makes f the newest Flow of the ring. It never blocks and may be
// called from several goroutines. After Close it does nothing.
func (r *Ring) Publish(f *Flow) {
	if r.closed.Load() {
		return
	}
	s := &slot{seq: r.head.Add(1) - 1, flow: f}
	at := &r.slots[s.seq&r.mask]
	for {
		old := at.Load()
		if old != nil && old.seq > s.seq {
			break // another writer lapped us: this Flow is overrun already
		}
		if at.CompareAndSwap(old, s) {
			break
		}
	}
	r.wake()
}

// PublishLoss tells every Reader of l. Losses are summed up per Reader by
// source and place, so they cannot themselves be overrun.
func (r *Ring) PublishLoss(l Loss) {
	if r.closed.Load() {
		return
	}
	for _, reader := range *r.readers.Load() {
		reader.addLoss(l)
	}
	r.wake()
}

// wake nudges the Readers that wait.
func (r *Ring) wake() {
	for _, reader := range *r.readers.Load() {
		if reader.waiting.Load() {
			reader.nudge()
		}
	}
}

// NewReader returns a Reader that gets what is published from now on. Close
// it when done.
func (r *Ring) NewReader() *Reader {
	reader := &Reader{ring: r, next: r.head.Load(), wakeup: make(chan struct{}, 1)}
	r.change(func(list []*Reader) []*Reader { return append(list, reader) })
	return reader
}

// Close ends the stream: Readers get what is left and then ErrClosed.
func (r *Ring) Close() {
	r.closed.Store(true)
	for _, reader := range *r.readers.Load() {
		reader.nudge()
	}
}

// RingStats describes a Ring's fill.
type RingStats struct {
	// Size is the number of Flows it holds, Published how many it got so far.
	Size      int
	Published uint64
	Readers   int
}

// Stats may be called at any time.
func (r *Ring) Stats() RingStats {
	return RingStats{Size: len(r.slots), Published: r.head.Load(), Readers: len(*r.readers.Load())}
}

// change replaces the list of readers by what edit makes of a copy.
func (r *Ring) change(edit func([]*Reader) []*Reader) {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := edit(append([]*Reader(nil), *r.readers.Load()...))
	r.readers.Store(&list)
}

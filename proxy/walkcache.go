package proxy

import "sync"

// maxWalks bounds a WalkCache, in choices.
const maxWalks = 8192

// WalkCache keeps the Outcomes of packets that a mode's rules cannot tell apart:
// K is all of a packet they look at. It is bounded, and may be used from many
// goroutines.
type WalkCache[K comparable] struct {
	mu   sync.Mutex
	keys map[K]Outcome
	size int // choices and one for each outcome
}

// NewWalkCache returns an empty cache.
func NewWalkCache[K comparable]() *WalkCache[K] { return &WalkCache[K]{keys: make(map[K]Outcome)} }

// Get returns the Outcome kept for k, which must not be changed.
func (c *WalkCache[K]) Get(k K) (Outcome, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	out, ok := c.keys[k]
	return out, ok
}

// Put keeps the Outcome for k, unless there is one.
func (c *WalkCache[K]) Put(k K, out Outcome) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.keys[k]; ok {
		return
	}
	c.keys[k] = out
	c.size += 1 + len(out.Choices)
	for old, o := range c.keys { // in no order
		if c.size <= maxWalks || old == k {
			break
		}
		delete(c.keys, old)
		c.size -= 1 + len(o.Choices)
	}
}

package iptables

import (
	"sync"

	"github.com/kptrace/kptrace/proxy"
)

// walkCache keeps outcomes for packets that our rules cannot tell apart.
type walkCache struct {
	mu   sync.Mutex
	keys map[walkKey]proxy.Outcome
	size int // choices and one for each outcome
}

// maxWalks bounds the cache, in choices.
const maxWalks = 8192

func newWalkCache() *walkCache { return &walkCache{keys: make(map[walkKey]proxy.Outcome)} }

func (c *walkCache) get(k walkKey) (proxy.Outcome, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	out, ok := c.keys[k]
	return out, ok
}

func (c *walkCache) put(k walkKey, out proxy.Outcome) {
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

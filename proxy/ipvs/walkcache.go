package ipvs

import (
	"net/netip"
	"sync"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// walkCache keeps outcomes for packets that our rules cannot tell apart. It lives
// as long as what rules depend on besides Services.
type walkCache struct {
	mu   sync.Mutex
	keys map[walkKey]proxy.Outcome
	size int // choices and one for each outcome
}

// walkKey is all of a packet that our rules look at.
type walkKey struct {
	unit         *unit // nil where no Service claims the packet
	dst          netip.AddrPort
	proto        conntrack.Proto
	fromNode, lo bool
	source       sourceClass
}

// sourceClass is what our rules can tell about a source address.
type sourceClass struct {
	// special is the address where it is an endpoint's or one of the Service's
	// own.
	special         netip.Addr
	local, loopback bool
	inCluster       bool
	ranged          bool
}

func (f *familyProgram) sourceOf(pkt *proxy.Packet, u *unit) sourceClass {
	src := pkt.Src.Addr()
	c := sourceClass{local: f.isLocal(src) || f.bound[src], loopback: src.IsLoopback(), inCluster: f.detector.Local(pkt)}
	if u == nil {
		return c
	}
	if src == pkt.Dst.Addr() {
		c.special = src
	}
	for i := range u.entries {
		e := &u.entries[i]
		switch {
		case e.set == setLoopBack && e.ip == src, e.set == setClusterIP && e.ip == src, e.set == setSourceIP && e.ip == src:
			c.special = src
		case e.set == setSourceCIDR && e.ip == pkt.Dst.Addr() && netip.PrefixFrom(e.other, int(e.bits)).Contains(src):
			c.ranged = true
		}
	}
	return c
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

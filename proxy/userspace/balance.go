package userspace

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

// maxClients bounds the clients whose endpoint one Service port remembers,
// about 150 bytes each. Beyond it the one seen longest ago is forgotten.
const maxClients = 32768

// The words of RelayEvent.Affinity.
const (
	affinityNone    = "none"
	affinityHit     = "hit"
	affinityNew     = "new"
	affinityExpired = "expired"
	affinityReset   = "reset"
)

// balancer picks endpoints for one Service port: round robin, and by session
// affinity where the Service has it.
type balancer struct {
	mu      sync.Mutex
	timeout time.Duration
	// rings holds the endpoints of the policies Cluster and Local.
	rings   [2]ring
	clients map[netip.Addr]*pinned
	// oldest and newest are the ends of a list by last use.
	oldest, newest *pinned
	// evicted counts those forgotten for want of room.
	evicted *atomic.Uint64
}

// ring is a set of endpoints in the order in which they are picked.
type ring struct {
	sorted []netip.AddrPort
	order  []netip.AddrPort
	next   int
}

// pinned is a client and its endpoint.
type pinned struct {
	client     netip.Addr
	endpoint   netip.AddrPort
	used       time.Time
	prev, then *pinned
}

// choice is one pick.
type choice struct {
	endpoint netip.AddrPort
	affinity string
	age      time.Duration
}

func ringOf(local bool) int {
	if local {
		return 1
	}
	return 0
}

// set changes timeout and endpoints. A set that stays keeps its place in the
// round; another one is shuffled. Clients of endpoints that are gone are
// forgotten, and so are those whose time is long over.
func (b *balancer) set(timeout time.Duration, cluster, local []proxy.Endpoint, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.timeout = timeout
	changed := b.rings[0].set(cluster)
	changed = b.rings[1].set(local) || changed
	if changed {
		for _, p := range b.clients {
			if !b.rings[0].has(p.endpoint) && !b.rings[1].has(p.endpoint) {
				b.forget(p)
			}
		}
	}
	b.sweep(now)
}

func (r *ring) set(eps []proxy.Endpoint) (changed bool) {
	sorted := make([]netip.AddrPort, len(eps))
	for i := range eps {
		sorted[i] = eps[i].Addr
	}
	slices.SortFunc(sorted, netip.AddrPort.Compare)
	if slices.Equal(sorted, r.sorted) {
		return false
	}
	r.sorted, r.order, r.next = sorted, slices.Clone(sorted), 0
	rand.Shuffle(len(r.order), func(i, j int) { r.order[i], r.order[j] = r.order[j], r.order[i] })
	return true
}

func (r *ring) has(ep netip.AddrPort) bool {
	_, ok := slices.BinarySearchFunc(r.sorted, ep, netip.AddrPort.Compare)
	return ok
}

// pick chooses an endpoint for a client, not one of those tried unless all
// were. It reports false where there is none.
func (b *balancer) pick(client netip.Addr, local bool, tried []netip.AddrPort, now time.Time) (choice, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := &b.rings[ringOf(local)]
	c := choice{affinity: affinityNone}
	p := b.clients[client]
	if b.timeout > 0 {
		c.affinity = affinityNew
		switch {
		case len(tried) > 0:
			c.affinity = affinityReset
		case p == nil:
		case now.Sub(p.used) >= b.timeout:
			c.affinity, c.age = affinityExpired, now.Sub(p.used)
		case !r.has(p.endpoint):
			c.affinity = affinityReset
		default:
			c.endpoint, c.affinity, c.age = p.endpoint, affinityHit, now.Sub(p.used)
			p.used = now
			b.unlink(p)
			b.link(p)
			return c, true
		}
	}
	n := len(r.order)
	if n == 0 {
		return c, false
	}
	at := r.next
	for i := range n {
		if !slices.Contains(tried, r.order[(r.next+i)%n]) {
			at = (r.next + i) % n
			break
		}
	}
	r.next = (at + 1) % n
	c.endpoint = r.order[at]
	if b.timeout > 0 {
		b.pin(client, c.endpoint, now)
	}
	return c, true
}

// unpin forgets a client's endpoint because it failed.
func (b *balancer) unpin(client netip.Addr, endpoint netip.AddrPort) (was bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.clients[client]
	if p == nil || p.endpoint != endpoint {
		return false
	}
	b.forget(p)
	return true
}

func (b *balancer) pin(client netip.Addr, endpoint netip.AddrPort, now time.Time) {
	p := b.clients[client]
	if p == nil {
		if len(b.clients) >= maxClients {
			b.evicted.Add(1)
			b.forget(b.oldest)
		}
		if b.clients == nil {
			b.clients = make(map[netip.Addr]*pinned)
		}
		p = &pinned{client: client}
		b.clients[client] = p
	} else {
		b.unlink(p)
	}
	p.endpoint, p.used = endpoint, now
	b.link(p)
}

// sweep forgets the clients whose time is long over; until then it can be told
// that it was. The caller holds mu.
func (b *balancer) sweep(now time.Time) {
	for b.oldest != nil && (b.timeout == 0 || now.Sub(b.oldest.used) >= 2*b.timeout) {
		b.forget(b.oldest)
	}
}

func (b *balancer) forget(p *pinned) {
	b.unlink(p)
	delete(b.clients, p.client)
}

func (b *balancer) link(p *pinned) {
	p.prev, p.then = b.newest, nil
	if b.newest != nil {
		b.newest.then = p
	} else {
		b.oldest = p
	}
	b.newest = p
}

func (b *balancer) unlink(p *pinned) {
	if p.prev != nil {
		p.prev.then = p.then
	} else {
		b.oldest = p.then
	}
	if p.then != nil {
		p.then.prev = p.prev
	} else {
		b.newest = p.prev
	}
	p.prev, p.then = nil, nil
}

// tidy sweeps, and returns how many clients are remembered.
func (b *balancer) tidy(now time.Time) (clients int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sweep(now)
	return len(b.clients)
}

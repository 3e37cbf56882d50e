package userspace

import (
	"errors"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

func endpoints(names ...string) (eps []proxy.Endpoint) {
	for _, n := range names {
		eps = append(eps, proxy.Endpoint{Addr: netip.MustParseAddrPort("10.0.0." + n + ":80"), Ready: true, Serving: true})
	}
	return eps
}

func newBalancer(timeout time.Duration, names ...string) *balancer {
	b := &balancer{evicted: new(atomic.Uint64)}
	b.set(timeout, endpoints(names...), nil, start0)
	return b
}

var (
	start0 = time.Unix(1000, 0)
	alice  = netip.MustParseAddr("192.0.2.1")
	bob    = netip.MustParseAddr("192.0.2.2")
)

// must picks, and fails the test where there is nothing to pick.
func (b *balancer) must(t *testing.T, client netip.Addr, now time.Time) choice {
	t.Helper()
	c, ok := b.pick(client, false, nil, now)
	if !ok {
		t.Fatal("no endpoint")
	}
	return c
}

func TestRoundRobin(t *testing.T) {
	if _, ok := newBalancer(0).pick(alice, false, nil, start0); ok {
		t.Error("picked one of none")
	}
	one := newBalancer(0, "1")
	if one.must(t, alice, start0).endpoint != one.must(t, bob, start0).endpoint {
		t.Error("one endpoint is several")
	}
	b := newBalancer(0, "1", "2", "3")
	round := func() (seen []netip.AddrPort) {
		for range 3 {
			seen = append(seen, b.must(t, alice, start0).endpoint)
		}
		return seen
	}
	first := round()
	if first[0] == first[1] || first[1] == first[2] || first[0] == first[2] {
		t.Errorf("a round of %v", first)
	}
	b.must(t, bob, start0)
	// The same set keeps its place in the round, in whatever order it comes.
	b.set(0, endpoints("3", "1", "2"), nil, start0)
	if got := b.must(t, alice, start0).endpoint; got != first[1] {
		t.Errorf("after the same set: %s, want %s", got, first[1])
	}
	b.set(0, endpoints("1", "2"), nil, start0)
	for range 4 {
		if got := b.must(t, alice, start0).endpoint; got == endpoints("3")[0].Addr {
			t.Errorf("picked %s, which is gone", got)
		}
	}
	// What was tried is passed over until all were.
	tried := []netip.AddrPort{endpoints("1")[0].Addr}
	for range 4 {
		if c, _ := b.pick(alice, false, tried, start0); c.endpoint != endpoints("2")[0].Addr {
			t.Errorf("picked %s again", c.endpoint)
		}
	}
	if _, ok := b.pick(alice, false, append(tried, endpoints("2")[0].Addr), start0); !ok {
		t.Error("nothing to pick after all were tried")
	}
	if _, ok := b.pick(alice, true, nil, start0); ok {
		t.Error("picked a local endpoint where there is none")
	}
}

func TestSticky(t *testing.T) {
	const timeout = 10 * time.Second
	b := newBalancer(timeout, "1", "2", "3")
	at := func(s int) time.Time { return start0.Add(time.Duration(s) * time.Second) }
	check := func(client netip.Addr, s int, affinity string) netip.AddrPort {
		t.Helper()
		c := b.must(t, client, at(s))
		if c.affinity != affinity {
			t.Errorf("at %ds: affinity %s, want %s", s, c.affinity, affinity)
		}
		return c.endpoint
	}
	a, o := check(alice, 0, "new"), check(bob, 0, "new")
	if a == o {
		t.Error("two clients in a row got one endpoint")
	}
	for s := 5; s <= 30; s += 5 { // each use puts the end off
		if check(alice, s, "hit") != a {
			t.Error("alice was moved")
		}
	}
	check(bob, 15, "expired")
	check(bob, 20, "hit")
	// A changed timeout takes effect at once.
	b.set(2*time.Second, endpoints("1", "2", "3"), nil, at(31))
	check(alice, 33, "expired")
	a = check(alice, 34, "hit")
	// An endpoint that fails loses the client, and the next one sticks.
	if !b.unpin(alice, a) || b.unpin(alice, a) {
		t.Error("unpinning")
	}
	c, _ := b.pick(alice, false, []netip.AddrPort{a}, at(34))
	if c.endpoint == a || c.affinity != "reset" {
		t.Errorf("after a failure: %+v", c)
	}
	if check(alice, 35, "hit") != c.endpoint {
		t.Error("the next endpoint does not stick")
	}
	// One that is gone takes its clients along.
	var rest []proxy.Endpoint
	for _, e := range endpoints("1", "2", "3") {
		if e.Addr != c.endpoint {
			rest = append(rest, e)
		}
	}
	b.set(2*time.Second, rest, nil, at(35))
	if check(alice, 36, "new") == c.endpoint {
		t.Error("picked what is gone")
	}
	// Sweeping forgets who did not come for long.
	if n := b.tidy(at(100)); n != 0 || b.oldest != nil || b.newest != nil {
		t.Errorf("%d clients are remembered", n)
	}
	b.set(0, rest, nil, at(100))
	check(alice, 101, "none")
}

// TestStickyBounded has more clients than are remembered.
func TestStickyBounded(t *testing.T) {
	b := newBalancer(time.Hour, "1", "2")
	const more = 100
	for i := range maxClients + more {
		b.must(t, netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), start0)
	}
	if n := b.tidy(start0); n != maxClients || b.evicted.Load() != more {
		t.Errorf("%d remembered, %d forgotten", n, b.evicted.Load())
	}
}

func TestParsePortRange(t *testing.T) {
	for _, tt := range []struct {
		text string
		want PortRange
	}{{"", PortRange{}}, {"0-0", PortRange{}}, {"5", PortRange{5, 5}}, {"10-20", PortRange{10, 20}}, {"10+5", PortRange{10, 15}}, {"1-65535", PortRange{1, 65535}}} {
		if got, err := ParsePortRange(tt.text); err != nil || got != tt.want {
			t.Errorf("%q: %v, %v", tt.text, got, err)
		}
	}
	for _, bad := range []string{"a", "20-10", "1-65536", "65535+1", "-5", "0-5", "1-", "1-2-3"} {
		if got, err := ParsePortRange(bad); err == nil {
			t.Errorf("%q is %v", bad, got)
		}
	}
}

func TestPorts(t *testing.T) {
	none := newPorts(PortRange{})
	for range 3 {
		if err := none.take(func(p uint16) error {
			if p != 0 {
				t.Errorf("port %d of no range", p)
			}
			return nil
		}, nil); err != nil {
			t.Error(err)
		}
	}
	busy := func(err error) bool { return errors.Is(err, syscall.EADDRINUSE) }
	p := newPorts(PortRange{100, 109})
	taken := map[uint16]bool{}
	get := func() error {
		return p.take(func(port uint16) error {
			if port == 105 { // somebody else's
				return syscall.EADDRINUSE
			}
			if port < 100 || port > 109 || taken[port] {
				t.Errorf("port %d", port)
			}
			taken[port] = true
			return nil
		}, busy)
	}
	for range 9 {
		if err := get(); err != nil {
			t.Fatal(err)
		}
	}
	err := get()
	if !errors.Is(err, errPortsFull) || p.free() != 1 {
		t.Errorf("a full range: %v, %d free", err, p.free())
	}
	t.Log(err)
	delete(taken, 103)
	p.release(103)
	if err := get(); err != nil || !taken[103] {
		t.Errorf("a port given back is not taken: %v", err)
	}
	if err := newPorts(PortRange{1, 9}).take(func(uint16) error { return syscall.EPERM }, busy); !errors.Is(err, syscall.EPERM) {
		t.Errorf("another error: %v", err)
	}
}

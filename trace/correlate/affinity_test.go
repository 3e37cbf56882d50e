package correlate_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

func TestAffinity(t *testing.T) {
	const client = "10.244.1.5"
	port := 1000
	// dial makes a connection and returns what was said of it.
	dial := func(l *lab, from string, ep netip.AddrPort, missed bool) trace.Decision {
		port++
		k := l.conn(sticky, fmt.Sprintf("%s:%d", from, port), ep)
		if missed {
			k.miss()
		}
		k.pick()
		return l.updates[len(l.updates)-1].Decision
	}
	check := func(t *testing.T, d trace.Decision, word trace.Affinity, age time.Duration) {
		t.Helper()
		if d.Affinity != word || d.AffinityAge != age || d.AffinityTimeout != 10*time.Second {
			t.Errorf("affinity %q age %v timeout %v, want %q %v", d.Affinity, d.AffinityAge, d.AffinityTimeout, word, age)
		}
		if chance := d.Probability != 0; chance != (word != trace.AffinityHit) || d.Algorithm != "random" {
			t.Errorf("%s: probability %v, algorithm %q", word, d.Probability, d.Algorithm)
		}
	}
	others := func(l *lab, n int, ep netip.AddrPort) {
		for i := range n {
			dial(l, fmt.Sprintf("10.244.7.%d", i), ep, true)
		}
	}

	t.Run("new and hit", func(t *testing.T) {
		l := newLab(t, nil)
		check(t, dial(l, client, ep1, true), trace.AffinityNew, 0)
		l.pass(9 * time.Second)
		check(t, dial(l, client, ep1, false), trace.AffinityHit, 9*time.Second)
		l.pass(9 * time.Second) // it slides
		check(t, dial(l, client, ep1, false), trace.AffinityHit, 9*time.Second)
	})
	t.Run("expired", func(t *testing.T) {
		l := newLab(t, nil)
		dial(l, client, ep1, true)
		l.pass(12 * time.Second)
		check(t, dial(l, client, ep2, true), trace.AffinityExpired, 12*time.Second)
		check(t, dial(l, client, ep2, false), trace.AffinityHit, 0)
	})
	t.Run("expired within the clocks' difference", func(t *testing.T) {
		l := newLab(t, nil)
		dial(l, client, ep1, true)
		l.pass(9990 * ms)
		check(t, dial(l, client, ep2, true), trace.AffinityExpired, 9990*ms)
	})
	t.Run("evicted", func(t *testing.T) {
		l := newLab(t, nil)
		dial(l, client, ep1, true)
		others(l, 100, ep1)
		check(t, dial(l, client, ep2, true), trace.AffinityEvicted, 0)
		f := l.updates[len(l.updates)-1]
		if f.Reason != trace.AffinityForgotten || f.Outcome.Failed() || f.Cause != "it was with 10.244.1.2:8080 before, whose list keeps the last 100 clients" {
			t.Errorf("got %s for %q (%s)", f.Outcome, f.Reason, f.Cause)
		}
		// Its failures have reasons of their own.
		l.wait(1500 * ms)
		if f := l.flows[f.ID]; f.Outcome != trace.Unanswered || f.Reason != trace.DroppedOnNode {
			t.Errorf("unanswered: %s for %q", f.Outcome, f.Reason)
		}
	})
	t.Run("evicted, and the same endpoint picked", func(t *testing.T) {
		l := newLab(t, nil)
		dial(l, client, ep1, true)
		others(l, 100, ep1)
		check(t, dial(l, client, ep1, true), trace.AffinityEvicted, 0)
		if f := l.updates[len(l.updates)-1]; f.Reason != trace.NoReason {
			t.Errorf("a reason where affinity held by chance: %q", f.Reason)
		}
	})
	t.Run("99 others do not evict", func(t *testing.T) {
		l := newLab(t, nil)
		dial(l, client, ep1, true)
		others(l, 99, ep1)
		others(l, 99, ep1)
		check(t, dial(l, client, ep1, false), trace.AffinityHit, 0)
		dial(l, client, ep1, false)
		others(l, 99, ep1)
		check(t, dial(l, client, ep2, true), trace.AffinityReset, 0)
	})
	t.Run("others of another endpoint do not evict", func(t *testing.T) {
		l := newLab(t, nil)
		dial(l, client, ep1, true)
		others(l, 200, ep2)
		check(t, dial(l, client, ep1, true), trace.AffinityReset, 0)
	})
	t.Run("endpoint gone", func(t *testing.T) {
		l := newLab(t, nil)
		dial(l, client, ep1, true)
		l.pass(time.Second)
		m := endpoints()
		m[sticky] = []netip.AddrPort{ep2, ep3}
		l.views = append([]*viewT{view(epoch, &l.walks, m)}, l.views...)
		check(t, dial(l, client, ep2, true), trace.AffinityReset, 0)
	})
	t.Run("list emptied", func(t *testing.T) {
		l := newLab(t, nil)
		dial(l, client, ep1, true)
		l.pass(time.Second)
		check(t, dial(l, client, ep1, true), trace.AffinityReset, 0)
	})
	t.Run("seeded", func(t *testing.T) {
		l := newLab(t, nil)
		l.c.SeedAffinity(correlate.AffinitySeed{Client: netip.MustParseAddr(client), Service: sticky, Endpoint: ep1, Last: epoch.Add(-3 * time.Second)})
		check(t, dial(l, client, ep1, false), trace.AffinityHit, 3*time.Second)
		check(t, dial(l, "10.244.1.6", ep1, false), trace.AffinityHit, 0)
	})
	t.Run("seeded with itself", func(t *testing.T) {
		l := newLab(t, nil)
		l.c.SeedAffinity(correlate.AffinitySeed{Client: netip.MustParseAddr(client), Service: sticky, Endpoint: ep1, Last: time.Unix(0, l.now)})
		check(t, dial(l, client, ep1, true), trace.AffinityNew, 0)
		l.pass(2 * time.Second)
		check(t, dial(l, client, ep1, true), trace.AffinityReset, 0)
	})
	t.Run("none", func(t *testing.T) {
		l := newLab(t, nil)
		l.conn(foo, pod, ep1).pick()
		if d := l.only().Decision; d.Affinity != trace.AffinityNone || d.AffinityTimeout != 0 {
			t.Errorf("%+v", d)
		}
	})
	t.Run("other packets in between", func(t *testing.T) {
		l := newLab(t, nil)
		a, b := l.conn(sticky, "10.244.1.5:1", ep1), l.conn(sticky, "10.244.1.6:1", ep2)
		b.isn = 9
		a.miss()
		b.miss()
		b.pick()
		a.pick()
		for _, f := range l.flows {
			check(t, f.Decision, trace.AffinityNew, 0)
		}
	})
	t.Run("lost", func(t *testing.T) {
		l := newLab(t, nil)
		lose := func() { l.c.Lost(trace.Loss{Source: trace.NFLog, From: l.now, To: l.now, Events: 1}) }
		dial(l, client, ep1, true)
		l.pass(time.Second)
		lose()
		check(t, dial(l, client, ep1, false), trace.AffinityHit, time.Second)
		if d := dial(l, client, ep2, false); d.Affinity != "" || d.Note == "" {
			t.Errorf("%q, note %q", d.Affinity, d.Note)
		}
	})
	t.Run("bounded", func(t *testing.T) {
		l := newLab(t, func(c *correlate.Config) { c.MaxAffinity = 50 })
		dial(l, client, ep1, true)
		others(l, 100, ep1)
		l.wait(50 * ms)
		if n := l.c.Stats().Clients; n != 50 {
			t.Errorf("%d clients", n)
		}
		check(t, dial(l, client, ep2, true), trace.AffinityNew, 0)
	})
	t.Run("many endpoints", func(t *testing.T) {
		l := newLab(t, nil)
		m := endpoints()
		m[sticky] = nil
		for i := range 40 {
			m[sticky] = append(m[sticky], netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, 3, byte(i)}), 80))
		}
		l.views = []*proxy.View{view(epoch, &l.walks, m)}
		d := dial(l, client, m[sticky][33], true)
		check(t, d, trace.AffinityNew, 0)
		if d.Candidates != 40 || d.Probability != 1./40 {
			t.Errorf("%+v", d)
		}
	})
}

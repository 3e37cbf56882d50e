package correlate_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

// TestSeededAffinity tells of clients that the kernel knew before, where no rule
// reports a miss: beside another kube-proxy.
func TestSeededAffinity(t *testing.T) {
	translated := &proxy.Rule{Tag: proxy.Tag{Kind: proxy.TagPick, ID: proxy.IDTranslated}}
	for _, c := range []struct {
		name     string
		age      time.Duration // of the seed, 0 for none
		complete bool
		endpoint int // picked; the seed is of the first
		want     trace.Affinity
		told     time.Duration
		doubt    bool
	}{
		{"hit", 4 * time.Second, true, 0, trace.AffinityHit, 4 * time.Second, false},
		{"new", 0, true, 0, trace.AffinityNew, 0, false},
		{"nothing known", 0, false, 0, "", 0, true},
		{"expired", 15 * time.Second, true, 1, trace.AffinityExpired, 15 * time.Second, false},
		{"as old as the timeout", 10*time.Second + 300*ms, true, 0, "", 0, true},
		{"nearly as old", 9*time.Second + 300*ms, true, 0, "", 0, true},
		{"reset", 4 * time.Second, true, 1, trace.AffinityReset, 0, false},
		{"known, of some lists only", 4 * time.Second, false, 0, trace.AffinityHit, 4 * time.Second, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t, nil)
			src := ap(pod)
			if c.age > 0 {
				l.c.SeedAffinity(correlate.AffinitySeed{Client: src.Addr(), Service: sticky, Endpoint: ep1, Last: time.Unix(0, l.now-int64(c.age))})
			}
			if c.complete {
				l.c.SeededAffinity()
			}
			ep := ep1
			if c.endpoint == 1 {
				ep = ep2
			}
			k := l.conn(sticky, pod, ep)
			k.vip()
			e := k.event(trace.KindPick, conntrack.NewTuple(conntrack.TCP, src, ep))
			e.Rule, e.Hook = translated, 4
			k.send(e)
			k.new()
			l.wait(200 * ms)
			d := l.only().Decision
			if d.Affinity != c.want || d.AffinityAge != c.told || (d.Note != "") != c.doubt {
				t.Errorf("affinity %q, age %v, note %q; want %q, %v", d.Affinity, d.AffinityAge, d.Note, c.want, c.told)
			}
			// The next one is told by what was seen.
			k2 := l.conn(sticky, src.Addr().String()+":40001", ep)
			k2.isn = 2000
			k2.vip()
			e = k2.event(trace.KindPick, conntrack.NewTuple(conntrack.TCP, k2.src, ep))
			e.Rule, e.Hook = translated, 4
			k2.send(e)
			if d := l.updates[len(l.updates)-1].Decision; d.Affinity != trace.AffinityHit || d.AffinityAge != 200*ms {
				t.Errorf("the next one: %q, %v", d.Affinity, d.AffinityAge)
			}
		})
	}
}

// TestRestoredAffinity begins to record in the middle of things: a second correlator
// that is told what the first one knew says the same of what follows, and of what both
// saw that it does not know.
func TestRestoredAffinity(t *testing.T) {
	live := newLab(t, func(c *correlate.Config) { c.RecentList = 2 })
	port := 0
	pick := func(l *lab, client string, ep netip.AddrPort, missed bool) trace.Decision {
		t.Helper()
		port++
		k := l.conn(sticky, netip.AddrPortFrom(netip.MustParseAddr(client), uint16(40000+port)).String(), ep)
		k.isn = uint32(port)
		if missed {
			k.miss()
		}
		k.pick()
		return l.updates[len(l.updates)-1].Decision
	}
	live.c.SeedAffinity(correlate.AffinitySeed{Client: netip.MustParseAddr("10.244.1.9"), Service: sticky, Endpoint: ep2, Last: time.Unix(0, live.now-int64(3*time.Second))})
	live.c.SeededAffinity()
	pick(live, "10.244.1.1", ep1, true)
	live.now += int64(time.Second)
	pick(live, "10.244.1.2", ep1, true)
	live.now += int64(time.Second)
	pick(live, "10.244.1.3", ep1, true) // drives the first one out
	both := live.now

	clients, complete := live.c.Affinity()
	replayed := newLab(t, func(c *correlate.Config) { c.RecentList = 2 })
	replayed.c.RestoreAffinity(clients, complete)
	replayed.now = both
	if d := pick(replayed, "10.244.1.3", ep1, true); d.Affinity != "" || d.Note == "" {
		t.Errorf("a pick that both saw: %q, %q", d.Affinity, d.Note)
	}
	for i, x := range []struct {
		client string
		ep     netip.AddrPort
		missed bool
		want   trace.Affinity
		age    time.Duration
	}{
		{"10.244.1.3", ep1, false, trace.AffinityHit, time.Second},
		{"10.244.1.2", ep1, false, trace.AffinityHit, 3 * time.Second},
		{"10.244.1.1", ep1, true, trace.AffinityEvicted, 0}, // drives 10.244.1.3 out
		{"10.244.1.3", ep1, true, trace.AffinityEvicted, 0},
		{"10.244.1.9", ep2, false, trace.AffinityHit, 10 * time.Second},
		{"10.244.1.4", ep2, true, trace.AffinityNew, 0},
		{"10.244.1.2", ep2, true, trace.AffinityEvicted, 0},
		{"10.244.1.9", ep1, true, trace.AffinityEvicted, 0},
		{"10.244.1.4", ep1, true, trace.AffinityReset, 0},
	} {
		live.now += int64(time.Second)
		replayed.now = live.now
		a, b := pick(live, x.client, x.ep, x.missed), pick(replayed, x.client, x.ep, x.missed)
		if a.Affinity != x.want || a.AffinityAge != x.age {
			t.Errorf("pick %d: live %q, %v; want %q, %v", i, a.Affinity, a.AffinityAge, x.want, x.age)
		}
		if b.Affinity != a.Affinity || b.AffinityAge != a.AffinityAge || b.Note != a.Note {
			t.Errorf("pick %d: replayed %q, %v, %q; live %q, %v, %q", i, b.Affinity, b.AffinityAge, b.Note, a.Affinity, a.AffinityAge, a.Note)
		}
	}
}

package correlate

import (
	"fmt"
	"net/netip"
	"time"
	"unique"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// AffinitySeed is one entry of the kernel's list of an endpoint: a client and
// when it last made a connection to the Service.
type AffinitySeed struct {
	Client   netip.Addr
	Service  proxy.PortName
	Endpoint netip.AddrPort
	Last     time.Time
}

// affinitySlack is how much younger than its timeout an entry may seem that
// the kernel found too old: the clocks are not the same.
const affinitySlack = int64(100 * time.Millisecond)

type affinityKey struct {
	client  [16]byte
	service unique.Handle[proxy.PortName]
}

type listKey struct {
	service  unique.Handle[proxy.PortName]
	endpoint netip.AddrPort
}

// affinityEntry is a client of a Service. It is in the list of its endpoint
// as long as the kernel's list would hold it.
type affinityEntry struct {
	key        affinityKey
	endpoint   netip.AddrPort
	last       int64
	evicted    bool
	seeded     bool           // last is from the kernel's list, with its error
	restored   bool           // of a recording's beginning, not touched since
	prev, next *affinityEntry // by use, among all
	list       *recentList
	up, down   *affinityEntry // by use, within the list
}

// recentList mimics an xt_recent list: it holds so many clients and drops the
// one not seen for longest.
type recentList struct {
	key         listKey
	first, last *affinityEntry
	n           int
}

type affinityTable struct {
	entries     map[affinityKey]*affinityEntry
	lists       map[listKey]*recentList
	first, last *affinityEntry
	max, listed int
	// complete says that all lists of the kernel were read.
	complete bool
}

func (t *affinityTable) init(max, listed int) {
	t.entries = make(map[affinityKey]*affinityEntry)
	t.lists = make(map[listKey]*recentList)
	t.max, t.listed = max, listed
}

func (t *affinityTable) seed(s AffinitySeed) {
	k := affinityKey{s.Client.As16(), unique.Make(s.Service)}
	if e := t.entries[k]; e == nil || e.last < s.Last.UnixNano() {
		t.touch(k, s.Endpoint, s.Last.UnixNano())
		t.entries[k].seeded = true
	}
}

// AffinityState is what a Correlator knows of one client of a Service.
type AffinityState struct {
	AffinitySeed
	// Exact says that Last is not from the kernel's list; Evicted that others have
	// driven the client out of that.
	Exact, Evicted bool
}

// state lists the clients, the one not seen for longest first.
func (t *affinityTable) state() (all []AffinityState) {
	for e := t.first; e != nil; e = e.next {
		all = append(all, AffinityState{
			AffinitySeed{netip.AddrFrom16(e.key.client).Unmap(), e.key.service.Value(), e.endpoint, time.Unix(0, e.last)}, !e.seeded, e.evicted,
		})
	}
	return all
}

func (t *affinityTable) restore(all []AffinityState) {
	for i := range all {
		s := &all[i]
		k := affinityKey{s.Client.As16(), unique.Make(s.Service)}
		t.touch(k, s.Endpoint, s.Last.UnixNano())
		e := t.entries[k]
		e.seeded, e.restored = !s.Exact, true
		if s.Evicted {
			t.unlist(e)
			e.evicted = true
		}
	}
}

// counted reports whether a pick is in what was restored already: what it found is
// not known then.
func (e *affinityEntry) counted(at int64) bool { return e != nil && e.restored && at <= e.last }

const countedNote = "affinity unknown: the recording began in the middle of this connection's start"

// seedSlack is by how much the time of a seeded entry may be wrong.
const seedSlack = int64(time.Second)

// doubtful reports whether an entry's time is not exact enough to tell whether it
// was too old.
func (e *affinityEntry) doubtful(now int64, timeout time.Duration) bool {
	if e == nil || !e.seeded {
		return false
	}
	d := now - e.last - int64(timeout)
	return -seedSlack < d && d < seedSlack
}

// judge says what affinity did to a new connection, and how long ago the
// client was last seen. missed says that no list held the client, candidate
// whether the endpoint it had may still be picked.
func (t *affinityTable) judge(k affinityKey, now int64, timeout time.Duration, missed bool,
	candidate func(netip.AddrPort) bool) (trace.Affinity, time.Duration) {
	e := t.entries[k]
	if e == nil {
		if missed {
			return trace.AffinityNew, 0
		}
		return trace.AffinityHit, 0
	}
	age := max(0, now-e.last)
	switch {
	case !missed:
		return trace.AffinityHit, time.Duration(age)
	case e.seeded && age < seedSlack:
		return trace.AffinityNew, 0 // no list held it, but one that was read: that was after this pick
	case !candidate(e.endpoint):
		return trace.AffinityReset, 0
	case age+affinitySlack >= int64(timeout):
		return trace.AffinityExpired, time.Duration(age)
	case e.evicted:
		return trace.AffinityEvicted, 0
	}
	return trace.AffinityReset, 0
}

// moved notes that a client is sent elsewhere than before, since the list of its
// endpoint had no room for it. old is what was known of the client.
func (c *Correlator) moved(r *rec, old *affinityEntry, endpoint netip.AddrPort) {
	if r.f.Decision.Affinity != trace.AffinityEvicted || old == nil || old.endpoint == endpoint {
		return
	}
	r.aside = &aside{trace.AffinityForgotten, fmt.Sprintf("it was with %v before, whose list keeps the last %d clients", old.endpoint, c.affinity.listed)}
}

// touch notes a new connection of a client to an endpoint.
func (t *affinityTable) touch(k affinityKey, endpoint netip.AddrPort, now int64) {
	e := t.entries[k]
	if e == nil {
		if len(t.entries) >= t.max {
			t.forget(t.first)
		}
		e = &affinityEntry{key: k}
		t.entries[k] = e
	} else {
		t.unlink(e)
		t.unlist(e)
	}
	e.endpoint, e.last, e.evicted, e.seeded, e.restored = endpoint, now, false, false, false
	if e.prev = t.last; e.prev != nil {
		e.prev.next = e
	} else {
		t.first = e
	}
	t.last = e

	lk := listKey{k.service, endpoint}
	l := t.lists[lk]
	if l == nil {
		l = &recentList{key: lk}
		t.lists[lk] = l
	}
	e.list = l
	if e.up = l.last; e.up != nil {
		e.up.down = e
	} else {
		l.first = e
	}
	l.last = e
	if l.n++; l.n > t.listed {
		old := l.first
		t.unlist(old)
		old.evicted = true
	}
}

func (t *affinityTable) forget(e *affinityEntry) {
	t.unlink(e)
	t.unlist(e)
	delete(t.entries, e.key)
}

func (t *affinityTable) unlink(e *affinityEntry) {
	if e.prev != nil {
		e.prev.next = e.next
	} else {
		t.first = e.next
	}
	if e.next != nil {
		e.next.prev = e.prev
	} else {
		t.last = e.prev
	}
	e.prev, e.next = nil, nil
}

func (t *affinityTable) unlist(e *affinityEntry) {
	l := e.list
	if l == nil {
		return
	}
	if e.up != nil {
		e.up.down = e.down
	} else {
		l.first = e.down
	}
	if e.down != nil {
		e.down.up = e.up
	} else {
		l.last = e.up
	}
	e.up, e.down, e.list = nil, nil, nil
	if l.n--; l.n == 0 {
		delete(t.lists, l.key)
	}
}

// missRing holds the misses whose pick has not come: on several CPUs other
// packets' reports may come in between.
type missRing struct {
	ring [64]miss
	n    int
	live int
}

type miss struct {
	tuple conntrack.Tuple
	seq   uint32
	time  int64
	used  bool
}

func (m *missRing) add(e *trace.Event) {
	at := &m.ring[m.n%len(m.ring)]
	if !at.used {
		m.live++
	}
	*at = miss{e.Tuple, e.TCPSeq, e.Time, true}
	m.n++
}

// take reports and forgets a miss of the packet that was picked.
func (m *missRing) take(e *trace.Event) bool {
	if m.live == 0 {
		return false
	}
	for i := 1; i <= len(m.ring); i++ {
		at := &m.ring[(m.n-i+len(m.ring)*2)%len(m.ring)]
		if at.used && at.seq == e.TCPSeq && at.tuple == e.Tuple && e.Time-at.time < int64(time.Second) {
			at.used = false
			m.live--
			return true
		}
	}
	return false
}

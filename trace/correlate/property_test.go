package correlate_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// story is what two sources saw, each in its own order.
type story struct {
	packets, entries []trace.Event
	connections      int
}

// tell makes up connections of all kinds, among them several one after the
// other on the same tuple.
func tell(r *rand.Rand, n int) *story {
	s := &story{connections: n}
	l := newLab(nil, nil)
	send := func(e *trace.Event) {
		if e.Source == trace.NFLog {
			s.packets = append(s.packets, *e)
		} else {
			s.entries = append(s.entries, *e)
		}
	}
	busy := map[string]int64{} // when a client's port may be used again
	users := map[string]proxy.PortName{}
	for i := range n {
		begin := epoch.UnixNano() + r.Int64N(int64(30*time.Second))
		service := []proxy.PortName{foo, sticky, dns}[r.IntN(3)]
		src := fmt.Sprintf("10.%d.1.5:%d", 244+r.IntN(2), 1000+r.IntN(8))
		lost := r.IntN(10) == 0
		if lost { // nothing could tell it from a neighbour on its tuple
			src = fmt.Sprintf("10.%d.1.5:%d", 244+r.IntN(2), 10000+i)
		}
		// A tuple may be taken again at once; another one with the same reply
		// tuple only after its entry is long gone.
		if before := users[src]; before == service {
			begin = max(begin, busy[src])
		} else {
			begin = max(begin, busy[src]+int64(300*ms))
		}
		users[src] = service
		k := l.conn(service, src, []netip.AddrPort{ep1, ep2}[r.IntN(2)])
		k.send, k.isn, k.ctid = send, uint32(i*1000+1), uint32(r.IntN(3))
		k.masq = src[:6] != "10.244"
		l.now = begin
		if service == sticky && !lost && r.IntN(2) == 0 {
			k.miss()
		}
		if !lost {
			k.pick()
		}
		step := func(d time.Duration) { l.now += 1 + r.Int64N(int64(d)) }
		l.now += 1000
		k.new()
		step(3 * ms)
		switch kind := r.IntN(6); {
		case service == dns && kind < 4:
			k.answer()
			step(time.Second)
			k.destroy(answered, packets(1, 1))
		case service == dns && kind == 4:
			k.icmp(3, 3)
			step(time.Second)
			k.destroy(packets(1, 0))
		case service == dns:
			step(3 * time.Second)
			k.destroy(packets(1, 0))
		case kind == 0:
			k.rstIn()
			k.destroy(early, state(conntrack.TCPClose), packets(1, 1))
		case kind == 1:
			l.now += int64(time.Second)
			k.syn()
			l.now += int64(2 * time.Second)
			k.icmp(3, 1)
			step(time.Second)
			k.destroy(packets(2, 0))
		case kind == 2:
			k.synack()
			step(20 * ms)
			k.rstOut()
			step(time.Second)
			k.destroy(answered, packets(3, 3), state(conntrack.TCPClose))
		default:
			k.synack()
			step(50 * ms)
			k.finOut()
			step(2 * ms)
			k.finIn()
			if kind > 4 {
				step(time.Second)
			}
			l.now += 1000
			k.destroy(answered, packets(5, 5), state(conntrack.TCPTimeWait))
		}
		l.now += 1 + r.Int64N(int64(5*ms))
		busy[src] = l.now
		if service == dns {
			busy[src] += int64(10 * ms) // sooner would be two datagrams at once
		}
	}
	byTime := func(a, b trace.Event) int { return int(a.Time - b.Time) }
	slices.SortStableFunc(s.packets, byTime)
	slices.SortStableFunc(s.entries, byTime)
	return s
}

// play hands the story over, the sources up to 100 ms apart, and returns the
// flows as they ended.
func (s *story) play(t *testing.T, r *rand.Rand) (*lab, []trace.Flow) {
	l := newLab(t, nil)
	p, q := s.packets, s.entries
	const skew = int64(100 * time.Millisecond)
	favour := r.IntN(3)
	for len(p)+len(q) > 0 {
		takeP := len(q) == 0
		if len(p) > 0 && len(q) > 0 {
			switch d := p[0].Time - q[0].Time; {
			case d > skew:
				takeP = false
			case d < -skew:
				takeP = true
			case favour == 0:
				takeP = r.IntN(2) == 0
			default:
				takeP = favour == 1
			}
			if r.IntN(20) == 0 {
				favour = r.IntN(3)
			}
		}
		var e trace.Event
		if takeP {
			e, p = p[0], p[1:]
		} else {
			e, q = q[0], q[1:]
		}
		l.c.Handle(&e)
		l.now = max(l.now, e.Time)
		if r.IntN(4) == 0 {
			l.c.Advance(time.Unix(0, l.now))
		}
	}
	l.wait(2 * time.Second)
	var flows []trace.Flow
	for _, f := range l.flows {
		g := *f
		g.ID, g.Revision, g.Completed = 0, 0, false
		flows = append(flows, g)
	}
	slices.SortFunc(flows, func(a, b trace.Flow) int {
		if c := a.Start.Compare(b.Start); c != 0 {
			return c
		}
		return a.Tuple.Src().Compare(b.Tuple.Src())
	})
	return l, flows
}

func TestOrderDoesNotMatter(t *testing.T) {
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 1))
		s := tell(r, 80)
		_, first := s.play(t, r)
		if len(first) != s.connections {
			t.Errorf("seed %d: %d flows of %d connections", seed, len(first), s.connections)
		}
		for i := range first {
			if f := &first[i]; !f.Ended || !f.Counted || f.Outcome == trace.Unknown {
				t.Errorf("seed %d: %v %s ended %v counted %v missing %q", seed, f.Tuple, f.Outcome, f.Ended, f.Counted, f.Missing)
			}
		}
		for range 5 {
			l, again := s.play(t, r)
			if st := l.c.Stats(); st.Open != 0 || st.Ended != 0 || st.Held != 0 {
				t.Errorf("seed %d: left over: %+v", seed, st)
			}
			if len(again) != len(first) {
				t.Fatalf("seed %d: %d flows, then %d", seed, len(first), len(again))
			}
			for i := range first {
				if !reflect.DeepEqual(first[i], again[i]) {
					t.Fatalf("seed %d:\n%+v\n%+v", seed, first[i], again[i])
				}
			}
		}
	}
}

func TestReplay(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	s := tell(r, 200)
	a, _ := s.play(t, rand.New(rand.NewPCG(1, 2)))
	b, _ := s.play(t, rand.New(rand.NewPCG(1, 2)))
	if !reflect.DeepEqual(a.updates, b.updates) {
		t.Errorf("the same calls gave other updates")
	}
	if len(a.updates) < 400 {
		t.Errorf("only %d updates", len(a.updates))
	}
}

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

// traffic hands over whole connections: pick, NEW, SYN-ACK, both FINs and,
// some connections later, the DESTROY.
type traffic struct {
	c     *correlate.Correlator
	e     trace.Event
	rule  proxy.Rule
	n     int
	now   int64
	every int
}

func newTraffic(change func(*correlate.Config)) *traffic {
	l := &lab{}
	views := []*proxy.View{view(epoch.Add(-time.Hour), &l.walks, endpoints())}
	cfg := correlate.Config{Node: "node1", Views: func() []*proxy.View { return views }}
	if change != nil {
		change(&cfg)
	}
	return &traffic{
		c: correlate.New(cfg), rule: proxy.Rule{Service: foo, Endpoint: ep2}, now: epoch.UnixNano(), every: 1000,
	}
}

func (x *traffic) tuples(i int) (orig, reply conntrack.Tuple) {
	src := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, 1, byte(i / 50000 % 200)}), uint16(1000+i%50000))
	return conntrack.NewTuple(conntrack.TCP, src, ap("10.96.0.10:80")), conntrack.NewTuple(conntrack.TCP, ep2, src)
}

func (x *traffic) packet(k trace.EventKind, t conntrack.Tuple) {
	x.now += 1000
	x.e = trace.Event{Kind: k, Source: trace.NFLog, Time: x.now, KernelTime: true, Tuple: t, TCPSeq: uint32(x.n)}
	if k == trace.KindPick {
		x.e.Rule = &x.rule
	}
	x.c.Handle(&x.e)
}

func (x *traffic) entry(k trace.EventKind, orig, reply conntrack.Tuple) {
	x.e = trace.Event{Kind: k, Source: trace.Conntrack, Time: x.now, Tuple: orig, Reply: reply, CTID: 9, Status: conntrack.DstNAT}
	if k == trace.KindDestroy {
		x.e.Out.Packets, x.e.In.Packets, x.e.Status = 5, 5, conntrack.DstNAT|conntrack.SeenReply
	}
	x.c.Handle(&x.e)
}

func (x *traffic) connection() {
	orig, reply := x.tuples(x.n)
	x.packet(trace.KindPick, orig)
	x.entry(trace.KindNew, orig, reply)
	x.packet(trace.KindSynAck, reply)
	x.packet(trace.KindFin, orig)
	x.packet(trace.KindFin, reply)
	if x.n++; x.n%x.every == 0 {
		x.now += int64(60 * time.Millisecond)
		x.c.Advance(time.Unix(0, x.now))
	}
	if x.n > 2*x.every {
		x.entry(trace.KindDestroy, first(x.tuples(x.n-2*x.every)), second(x.tuples(x.n-2*x.every)))
	}
}

func first(a, _ conntrack.Tuple) conntrack.Tuple  { return a }
func second(_, b conntrack.Tuple) conntrack.Tuple { return b }

func BenchmarkConnection(b *testing.B) {
	x := newTraffic(nil)
	b.ReportAllocs()
	for b.Loop() {
		x.connection()
	}
}

// BenchmarkConnectionFull keeps 65,536 ended flows that wait for a DESTROY.
func BenchmarkConnectionFull(b *testing.B) {
	x := newTraffic(nil)
	x.every = 100000000
	for range 70000 {
		x.connection()
		if x.n%1000 == 0 {
			x.now += int64(60 * time.Millisecond)
			x.c.Advance(time.Unix(0, x.now))
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		x.connection()
		if x.n%1000 == 0 {
			x.now += int64(60 * time.Millisecond)
			x.c.Advance(time.Unix(0, x.now))
		}
	}
}

// BenchmarkAdvance has 50,000 open flows and nothing to do.
func BenchmarkAdvance(b *testing.B) {
	x := newTraffic(nil)
	for range 50000 {
		orig, reply := x.tuples(x.n)
		x.packet(trace.KindPick, orig)
		x.packet(trace.KindSynAck, reply)
		x.n++
	}
	for b.Loop() {
		x.now += int64(50 * time.Millisecond)
		x.c.Advance(time.Unix(0, x.now))
	}
}

func TestAllocations(t *testing.T) {
	x := newTraffic(nil)
	for range 20000 {
		x.connection()
	}
	if n := testing.AllocsPerRun(20000, x.connection); n > 6 {
		t.Errorf("%v allocations per connection, want at most 6", n)
	}
}

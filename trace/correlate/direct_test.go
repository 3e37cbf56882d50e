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

// straight is a connection from an address to another, past every Service.
type straight struct {
	l *lab
	t conntrack.Tuple
}

func (l *lab) straight(proto conntrack.Proto, src, dst string) *straight {
	return &straight{l, conntrack.NewTuple(proto, ap(src), ap(dst))}
}

func (s *straight) ct(kind trace.EventKind, with ...func(*trace.Event)) {
	e := &trace.Event{Kind: kind, Source: trace.Conntrack, Time: s.l.now, Tuple: s.t, Reply: s.t.Reverse(), CTID: 9, Status: conntrack.Confirmed}
	for _, f := range with {
		f(e)
	}
	s.l.c.Handle(e)
}

func (s *straight) packet(kind trace.EventKind, t conntrack.Tuple) {
	s.l.c.Handle(&trace.Event{Kind: kind, Source: trace.NFLog, Time: s.l.now, KernelTime: true, Tuple: t, TCPSeq: 5})
}

// TestDirectCounted counts by who the client is, and shows nobody who has not asked.
func TestDirectCounted(t *testing.T) {
	l := newLab(t, nil)
	for _, c := range []struct {
		proto    conntrack.Proto
		src, dst string
	}{
		{conntrack.TCP, "10.244.1.5:1", "10.244.2.7:8080"}, // a pod here
		{conntrack.TCP, "10.244.1.5:2", "10.244.2.7:8080"},
		{conntrack.TCP, "10.1.0.1:3", "10.244.2.7:8080"},   // the node
		{conntrack.TCP, "10.244.2.7:4", "10.244.1.2:8080"}, // a pod elsewhere
		{conntrack.UDP, "192.0.2.9:5", "10.244.1.2:8080"},
		{conntrack.TCP, "10.244.1.5:6", "10.244.2.7:9090"}, // another port
		{conntrack.SCTP, "10.244.1.5:7", "10.244.9.9:1"},   // nobody's
	} {
		l.straight(c.proto, c.src, c.dst).ct(trace.KindNew)
	}
	l.wait(time.Second)
	if len(l.flows) != 0 {
		t.Errorf("%d flows are shown", len(l.flows))
	}
	tcp2 := trace.Target{Proto: conntrack.TCP, Addr: ep2}
	got := l.c.Direct()
	want := map[trace.Target]trace.Direct{
		tcp2:                              {Pods: 2, Node: 1},
		{Proto: conntrack.TCP, Addr: ep1}: {Elsewhere: 1},
		{Proto: conntrack.UDP, Addr: ep1}: {Elsewhere: 1},
	}
	if len(got) != len(want) {
		t.Errorf("counted %+v", got)
	}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%v: %+v, want %+v", k, got[k], v)
		}
	}
	// An endpoint that left is forgotten with the next look.
	v := view(epoch, &l.walks, map[proxy.PortName][]netip.AddrPort{foo: {ep1}})
	l.views = append([]*proxy.View{v}, l.views...)
	l.straight(conntrack.TCP, "10.244.1.5:8", "10.244.1.2:8080").ct(trace.KindNew)
	if got := l.c.Direct(); got[tcp2] != (trace.Direct{}) || got[trace.Target{Proto: conntrack.TCP, Addr: ep1}] != (trace.Direct{Pods: 1, Elsewhere: 1}) {
		t.Errorf("afterwards %+v", got)
	}
}

// TestDirectOfRelay does not take the userspace proxy's own connections for any.
func TestDirectOfRelay(t *testing.T) {
	l := newLab(t, nil)
	l.views[0].Mode = proxy.Userspace
	l.straight(conntrack.TCP, "10.1.0.1:3", "10.244.2.7:8080").ct(trace.KindNew)
	if got := l.c.Direct(); len(got) != 0 {
		t.Errorf("counted %+v", got)
	}
}

// TestDirectShown follows connections past Services from what their entries say,
// and from packets where these are reported.
func TestDirectShown(t *testing.T) {
	for _, c := range []struct {
		name   string
		run    func(l *lab, s *straight)
		out    trace.Outcome
		reason trace.Reason
		ended  bool
	}{
		{"open by its entry", func(l *lab, s *straight) {
			l.wait(2 * time.Second)
			s.ct(trace.KindEntry, answered, state(conntrack.TCPEstablished))
		}, trace.Open, "", false},
		{"closed by its entry", func(l *lab, s *straight) {
			l.wait(2 * time.Second)
			s.ct(trace.KindEntry, answered, state(conntrack.TCPEstablished))
			l.wait(5 * time.Second)
			s.ct(trace.KindEntry, answered, state(conntrack.TCPTimeWait), packets(5, 4))
		}, trace.Closed, "", true},
		{"over before anybody asked", func(l *lab, s *straight) {
			l.wait(2 * time.Second)
			s.ct(trace.KindEntry, answered, state(conntrack.TCPTimeWait), packets(5, 4))
		}, trace.Closed, "", true},
		{"unanswered by its entry", func(l *lab, s *straight) {
			l.wait(2 * time.Second)
			s.ct(trace.KindEntry, state(conntrack.TCPSynSent))
		}, trace.Unanswered, trace.SynUnanswered, false},
		{"closed by packets", func(l *lab, s *straight) {
			s.packet(trace.KindSynAck, s.t.Reverse())
			l.pass(ms)
			s.packet(trace.KindFin, s.t.Reverse())
			l.wait(time.Second)
		}, trace.Closed, "", true},
		{"refused", func(l *lab, s *straight) {
			s.packet(trace.KindRst, s.t.Reverse())
			l.wait(time.Second)
		}, trace.Refused, trace.EndpointRefused, true},
		{"gone", func(l *lab, s *straight) {
			l.wait(500 * ms)
			s.ct(trace.KindDestroy, answered, state(conntrack.TCPTimeWait), packets(5, 4))
			l.wait(time.Second)
		}, trace.Closed, "", true},
		{"nothing known", func(l *lab, s *straight) { l.wait(2 * time.Second) }, trace.Unknown, "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t, func(c *correlate.Config) { c.Direct = func() bool { return true } })
			l.canAsk = true
			s := l.straight(conntrack.TCP, "10.244.1.5:1", "10.244.2.7:8080")
			s.ct(trace.KindNew)
			l.pass(ms)
			c.run(l, s)
			f := l.only()
			if f.Outcome != c.out || f.Reason != c.reason || f.Ended != c.ended {
				t.Errorf("%s, %q, ended %v; want %s, %q, %v", f.Outcome, f.Reason, f.Ended, c.out, c.reason, c.ended)
			}
			if !f.Direct() || f.Service.Addr != ep2 || f.Client.Pod != "web-1" || f.Backend.Pod != "foo-b" || f.Service.Name.Name == "" {
				t.Errorf("it is %+v by %+v at %+v", f.Service, f.Client, f.Backend)
			}
		})
	}
}

// TestUnreported has an entry of a Service's connection of which no rule told, as
// while others had removed them: its answer is asked for, not denied.
func TestUnreported(t *testing.T) {
	for _, c := range []struct {
		name  string
		entry []func(*trace.Event)
		out   trace.Outcome
		ended bool
	}{
		{"over", []func(*trace.Event){answered, state(conntrack.TCPTimeWait), packets(5, 4)}, trace.Closed, true},
		{"open", []func(*trace.Event){answered, state(conntrack.TCPEstablished)}, trace.Open, false},
		{"unanswered", []func(*trace.Event){state(conntrack.TCPSynSent)}, trace.Unanswered, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t, nil)
			l.canAsk = true
			k := l.conn(foo, pod, ep1)
			k.new()
			l.wait(2 * time.Second)
			if f := l.only(); f.Outcome != trace.Unknown || len(l.asked) == 0 {
				t.Errorf("%s before the answer, %d questions", f.Outcome, len(l.asked))
			}
			k.entry(c.entry...)
			l.wait(100 * ms)
			if f := l.only(); f.Outcome != c.out || f.Ended != c.ended {
				t.Errorf("%s, ended %v", f.Outcome, f.Ended)
			}
		})
	}
}

package correlate_test

import (
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

const (
	ms  = time.Millisecond
	pod = "10.244.1.5:40000"
)

// want is what a test says of a flow; zero fields are not compared, except
// Ended.
type want struct {
	outcome  trace.Outcome
	reason   trace.Reason
	ended    bool
	missing  string
	est, dur time.Duration
	try      string
	retx     int
	tries    int
	icmp     string
	counted  bool
}

func (w want) check(t *testing.T, f *trace.Flow) {
	t.Helper()
	if f.Outcome != w.outcome || f.Reason != w.reason || f.Ended != w.ended || f.Missing != w.missing {
		t.Errorf("outcome %q reason %q ended %v missing %q, want %q %q %v %q",
			f.Outcome, f.Reason, f.Ended, f.Missing, w.outcome, w.reason, w.ended, w.missing)
	}
	est, dur := w.est, w.dur
	if est == 0 {
		est = -1
	}
	if dur == 0 {
		dur = -1
	}
	if f.Established != est || f.Duration != dur {
		t.Errorf("established %v duration %v, want %v %v", f.Established, f.Duration, est, dur)
	}
	if n := len(f.Attempts); n != max(w.tries, min(1, n)) {
		t.Errorf("%d attempts, want %d", n, w.tries)
	}
	if w.try != "" {
		a := f.Attempts[len(f.Attempts)-1]
		if a.Outcome != w.try || a.Retransmits != w.retx || a.ICMP != w.icmp {
			t.Errorf("attempt %+v, want %q, %d, %q", a, w.try, w.retx, w.icmp)
		}
	}
	if f.Counted != w.counted {
		t.Errorf("counted %v", f.Counted)
	}
}

func TestLife(t *testing.T) {
	closed := want{outcome: trace.Closed, ended: true, est: 2 * ms, dur: 32 * ms, try: "established"}
	counted := closed
	counted.counted = true
	tests := []struct {
		name    string
		service int
		masq    bool
		run     func(l *lab, k *conn)
		want    want
	}{
		{name: "pending", run: func(l *lab, k *conn) { k.pick().new(); l.wait(500 * ms) },
			want: want{outcome: trace.Pending, try: "pending"}},
		{name: "open", run: func(l *lab, k *conn) { k.pick().new(); l.pass(2 * ms); k.synack(); l.wait(5 * time.Second) },
			want: want{outcome: trace.Open, est: 2 * ms, try: "established"}},
		{name: "closed", run: func(l *lab, k *conn) {
			k.pick().new()
			l.pass(2 * ms)
			k.synack()
			l.pass(30 * ms)
			k.finOut().finIn()
			l.wait(100 * ms)
		}, want: closed},
		{name: "closed by server, half open", run: func(l *lab, k *conn) {
			k.pick().new()
			l.pass(2 * ms)
			k.synack()
			l.pass(30 * ms)
			k.finIn()
			l.wait(100 * ms)
			k.finOut()
			l.wait(time.Second)
		}, want: closed},
		{name: "closed, counted by destroy", run: func(l *lab, k *conn) {
			k.pick().new()
			l.pass(2 * ms)
			k.synack()
			l.pass(30 * ms)
			k.finOut().finIn()
			l.wait(120 * time.Second)
			k.destroy(answered, packets(5, 4), state(conntrack.TCPTimeWait))
		}, want: counted},
		{name: "closed, reset after fin", run: func(l *lab, k *conn) {
			k.pick().new()
			l.pass(2 * ms)
			k.synack()
			l.pass(30 * ms)
			k.finOut().rstIn()
			l.wait(time.Second)
		}, want: closed},
		{name: "fin without synack", run: func(l *lab, k *conn) { k.pick().new(); l.pass(32 * ms); k.finOut().finIn(); l.wait(time.Second) },
			want: want{outcome: trace.Closed, ended: true, dur: 32 * ms, try: "established"}},
		{name: "refused", run: func(l *lab, k *conn) { k.pick().new(); l.pass(ms); k.rstIn() },
			want: want{outcome: trace.Refused, reason: trace.EndpointRefused, ended: true, dur: ms, try: "refused"}},
		{name: "refused, destroyed first", run: func(l *lab, k *conn) {
			k.pick().new()
			l.pass(ms)
			k.destroy(early, state(conntrack.TCPClose), packets(1, 1))
			k.rstIn()
			l.wait(time.Second)
		}, want: want{outcome: trace.Refused, reason: trace.EndpointRefused, ended: true, dur: ms, try: "refused", counted: true}},
		{name: "refused, rst lost", run: func(l *lab, k *conn) {
			k.pick().new()
			l.pass(ms)
			k.destroy(early, state(conntrack.TCPClose))
			l.wait(time.Second)
		}, want: want{outcome: trace.Refused, reason: trace.EndpointRefused, ended: true, missing: "rst not seen", try: "refused"}},
		{name: "host unreachable", run: func(l *lab, k *conn) {
			k.pick().new()
			l.wait(time.Second)
			k.syn()
			l.wait(2 * time.Second)
			k.icmp(3, 1)
		}, want: want{outcome: trace.Refused, reason: trace.Unreachable, ended: true, dur: 3 * time.Second, try: "unreachable", retx: 1, icmp: "host unreachable from 10.0.0.1"}},
		{name: "packet too big is no error", run: func(l *lab, k *conn) { k.pick().new().icmp(3, 4) },
			want: want{outcome: trace.Pending, try: "pending"}},
		{name: "icmp after an answer", run: func(l *lab, k *conn) {
			k.pick().new()
			l.pass(ms)
			k.synack().icmp(3, 1)
			l.wait(time.Second)
		}, want: want{outcome: trace.Open, est: ms, try: "established", icmp: "host unreachable from 10.0.0.1"}},
		{name: "unanswered", run: func(l *lab, k *conn) { k.pick().new(); l.wait(1020 * ms); k.syn(); l.wait(3 * time.Second); k.syn() },
			want: want{outcome: trace.Unanswered, reason: trace.SynUnanswered, try: "unanswered", retx: 2}},
		{name: "answered late", run: func(l *lab, k *conn) { k.pick().new(); l.wait(2 * time.Second); k.synack() },
			want: want{outcome: trace.Open, est: 2 * time.Second, try: "established"}},
		{name: "timeout by silence", run: func(l *lab, k *conn) { k.pick().new(); l.wait(time.Second); k.syn(); l.wait(31 * time.Second) },
			want: want{outcome: trace.Timeout, reason: trace.SynUnanswered, ended: true, try: "timeout", retx: 1}},
		{name: "timeout by expiry", run: func(l *lab, k *conn) {
			k.pick().new()
			l.wait(5 * time.Second)
			k.destroy(packets(3, 0))
			l.wait(time.Second)
		},
			want: want{outcome: trace.Timeout, reason: trace.SynUnanswered, ended: true, try: "timeout", counted: true}},
		{name: "entry removed early while unanswered", run: func(l *lab, k *conn) { k.pick().new(); l.wait(2 * time.Second); k.destroy(early); l.wait(time.Second) },
			want: want{outcome: trace.Unanswered, reason: trace.SynUnanswered, try: "unanswered"}},
		{name: "client gives up", run: func(l *lab, k *conn) {
			k.pick().new()
			l.pass(ms)
			k.rstOut()
			l.wait(10 * time.Second)
			k.destroy(packets(2, 0))
			l.wait(time.Second)
		},
			want: want{outcome: trace.Timeout, reason: trace.SynUnanswered, ended: true, try: "timeout", counted: true}},
		{name: "client rejects an ACK that is older, and sends its SYN again", run: func(l *lab, k *conn) {
			k.pick().new()
			l.pass(ms)
			k.rstOut()
			l.wait(20 * ms)
			k.destroy(packets(2, 0))
			k.ctid = 8
			k.pick().new()
			l.pass(ms)
			k.synack()
			l.wait(100 * ms)
		},
			want: want{outcome: trace.Open, est: 22 * ms, tries: 2, try: "established"}},
		{name: "reset by endpoint", run: func(l *lab, k *conn) {
			k.pick().new()
			l.pass(ms)
			k.synack()
			l.pass(ms)
			k.rstIn()
			l.wait(time.Second)
		}, want: want{outcome: trace.Reset, reason: trace.ResetByEndpoint, ended: true, est: ms, dur: 2 * ms, try: "reset"}},
		{name: "reset by client", run: func(l *lab, k *conn) {
			k.pick().new()
			l.pass(ms)
			k.synack()
			l.pass(ms)
			k.rstOut()
			l.wait(time.Second)
		}, want: want{outcome: trace.Reset, reason: trace.ResetByClient, ended: true, est: ms, dur: 2 * ms, try: "reset"}},
		{name: "open, entry removed", run: func(l *lab, k *conn) {
			k.pick().new()
			l.pass(ms)
			k.synack()
			k.destroy(answered, early, state(conntrack.TCPEstablished))
			l.wait(time.Second)
		}, want: want{outcome: trace.Unknown, ended: true, est: ms, missing: "the end: the conntrack entry was removed", try: "established"}},
		{name: "open, fin lost, time wait over", run: func(l *lab, k *conn) {
			k.pick().new()
			l.pass(ms)
			k.synack()
			l.wait(time.Second)
			k.destroy(answered, state(conntrack.TCPTimeWait), packets(5, 5))
			l.wait(time.Second)
		}, want: want{outcome: trace.Closed, ended: true, est: ms, missing: "fin not seen", try: "established", counted: true}},
		{name: "masqueraded, answer before new", masq: true, run: func(l *lab, k *conn) {
			k.pick()
			l.pass(2 * ms)
			k.synack()
			l.pass(30 * ms)
			k.finOut().finIn().new()
			l.wait(time.Second)
		}, want: closed},
		{name: "masqueraded, no entry", masq: true, run: func(l *lab, k *conn) {
			k.pick()
			l.pass(2 * ms)
			k.synack()
			l.wait(2 * time.Second)
		}, want: want{outcome: trace.Unknown, missing: "the conntrack entry, without which answers cannot be told", try: "pending"}},
		{name: "masqueraded, no entry, client closes", masq: true, run: func(l *lab, k *conn) {
			k.pick()
			l.pass(2 * ms)
			k.synack()
			l.wait(2 * time.Second)
			k.finOut()
			l.wait(time.Second)
		}, want: want{outcome: trace.Closed, ended: true, dur: 2002 * ms, try: "established"}},
		{name: "new without pick", run: func(l *lab, k *conn) { k.new(); l.pass(ms); k.synack(); l.wait(time.Second) },
			want: want{outcome: trace.Open, est: ms, try: "established"}},
		{name: "new without pick, whole life within the hold", run: func(l *lab, k *conn) {
			k.new()
			l.pass(2 * ms)
			k.synack()
			l.pass(30 * ms)
			k.finOut().finIn()
			l.wait(time.Second)
		}, want: closed},
		{name: "rejected", run: func(l *lab, k *conn) { k.refuse(trace.KindReject, "no-endpoints") },
			want: want{outcome: trace.Rejected, reason: trace.NoEndpoints, ended: true}},
		{name: "dropped once for all SYNs", run: func(l *lab, k *conn) {
			k.refuse(trace.KindDrop, "no-local-endpoints")
			l.wait(time.Second)
			k.refuse(trace.KindDrop, "no-local-endpoints")
			l.wait(25 * time.Second)
			k.refuse(trace.KindDrop, "no-local-endpoints")
		}, want: want{outcome: trace.Dropped, reason: trace.NoLocalEndpoints, ended: true}},
		{name: "rejected when trying again", run: func(l *lab, k *conn) {
			k.pick().new()
			l.wait(time.Second)
			k.destroy(early)
			k.refuse(trace.KindReject, "no-endpoints")
		}, want: want{outcome: trace.Rejected, reason: trace.NoEndpoints, ended: true}},
		{name: "udp answered", service: 1, run: func(l *lab, k *conn) { k.pick().new(); l.pass(ms); k.answer() },
			want: want{outcome: trace.Open, est: ms, try: "established"}},
		{name: "udp idle", service: 1, run: func(l *lab, k *conn) {
			k.pick().new()
			l.pass(ms)
			k.answer()
			l.wait(30 * time.Second)
			k.destroy(answered, packets(1, 1))
			l.wait(time.Second)
		}, want: want{outcome: trace.Closed, ended: true, est: ms, dur: ms, try: "established", counted: true}},
		{name: "udp without reply", service: 1, run: func(l *lab, k *conn) { k.pick().new(); l.wait(2 * time.Second) },
			want: want{outcome: trace.Unanswered, reason: trace.NoReply, try: "unanswered"}},
		{name: "udp without reply, gone", service: 1, run: func(l *lab, k *conn) {
			k.pick().new()
			l.wait(30 * time.Second)
			k.destroy(packets(2, 0))
			l.wait(time.Second)
		}, want: want{outcome: trace.Timeout, reason: trace.NoReply, ended: true, try: "timeout", counted: true}},
		{name: "udp refused", service: 1, run: func(l *lab, k *conn) { k.pick().new(); l.pass(ms); k.icmp(3, 3) },
			want: want{outcome: trace.Refused, reason: trace.EndpointRefused, ended: true, dur: ms, try: "refused", icmp: "port unreachable from 10.0.0.1"}},
		{name: "sctp open", service: 2, run: func(l *lab, k *conn) { k.pick().new(); l.pass(2 * ms); k.synack(); l.wait(5 * time.Second) },
			want: want{outcome: trace.Open, est: 2 * ms, try: "established"}},
		{name: "sctp unanswered", service: 2, run: func(l *lab, k *conn) { k.pick().new(); l.wait(5 * time.Second) },
			want: want{outcome: trace.Unanswered, reason: trace.NoReply, try: "unanswered"}},
		{name: "sctp aborted at once", service: 2, run: func(l *lab, k *conn) { k.pick().new(); l.pass(ms); k.rstIn() },
			want: want{outcome: trace.Refused, reason: trace.EndpointRefused, ended: true, dur: ms, try: "refused"}},
		{name: "sctp shut down", service: 2, run: func(l *lab, k *conn) {
			k.pick().new()
			l.pass(2 * ms)
			k.synack()
			l.pass(30 * ms)
			k.finOut().finIn()
			l.wait(100 * ms)
		}, want: closed},
		{name: "sctp closed", service: 2, run: func(l *lab, k *conn) {
			k.pick().new()
			l.wait(5 * time.Second)
			k.destroy(answered, packets(9, 9))
			l.wait(time.Second)
		}, want: want{outcome: trace.Closed, ended: true, try: "established", counted: true}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, nil)
			k := l.conn(foo, pod, ep2)
			switch tt.service {
			case 1:
				k.service = dns
			case 2:
				k.service = sctp
			}
			k.masq = tt.masq
			tt.run(l, k)
			f := l.only()
			tt.want.check(t, f)
		})
	}
}

func TestDecision(t *testing.T) {
	t.Run("plain", func(t *testing.T) {
		l := newLab(t, nil)
		k := l.conn(foo, pod, ep2)
		k.pick().new()
		f := l.only()
		want := trace.Decision{
			Known: true, Mode: "iptables", Algorithm: "random", Candidates: 2, Probability: 0.5, Policy: "Cluster",
			Affinity: trace.AffinityNone, Masquerade: "no", SourceSeen: ap(pod),
		}
		want.Excluded.NotReady = 1
		if f.Decision != want {
			t.Errorf("got %+v\nwant %+v", f.Decision, want)
		}
		if f.Service != (trace.ServiceRef{Name: foo, Addr: ap("10.96.0.10:80"), Via: "ClusterIP"}) {
			t.Errorf("service %+v", f.Service)
		}
		if f.Client != (trace.Peer{Addr: ap(pod), Namespace: "shop", Pod: "web-1", Node: "node1", Workload: "Deployment/web"}) {
			t.Errorf("client %+v", f.Client)
		}
		if f.Backend != (trace.Peer{Addr: ep2, Namespace: "shop", Pod: "foo-b", Node: "node2", Workload: "Deployment/foo"}) {
			t.Errorf("backend %+v", f.Backend)
		}
		if f.Reply != k.reply() || f.Node != "node1" || !f.Start.Equal(epoch) {
			t.Errorf("reply %v node %q start %v", f.Reply, f.Node, f.Start)
		}
	})
	t.Run("one walk for many", func(t *testing.T) {
		l := newLab(t, nil)
		k := l.conn(foo, pod, ep2)
		for i := range 100 {
			k.src = ap(pod)
			k.src = addrPort(k.src, uint16(1000+i))
			k.pick()
		}
		if l.walks != 1 {
			t.Errorf("%d walks", l.walks)
		}
		l.views = append([]*viewT{view(epoch, &l.walks, endpoints())}, l.views...)
		k.src = addrPort(k.src, 9999)
		k.pick()
		if l.walks != 2 {
			t.Errorf("%d walks after a new view", l.walks)
		}
	})
	t.Run("hairpin", func(t *testing.T) {
		l := newLab(t, nil)
		k := l.conn(foo, "10.244.2.7:40000", ep2)
		k.masq = true
		k.pick()
		if f := l.only(); f.Decision.Masquerade != "hairpin" || !f.Reply.IsZero() || f.Decision.SourceSeen.IsValid() {
			t.Errorf("%+v", f.Decision)
		}
		k.synack()
		l.pass(ms)
		k.new()
		l.wait(time.Second)
		if f := l.only(); f.Outcome != trace.Open || f.Decision.SourceSeen != ap("10.1.0.1:40000") || f.Reply != k.reply() {
			t.Errorf("%s %+v", f.Outcome, f.Decision)
		}
	})
	t.Run("mark without reason", func(t *testing.T) {
		l := newLab(t, nil)
		k := l.conn(foo, pod, ep2)
		k.masq = true
		k.pick()
		if f := l.only(); f.Decision.Masquerade != "marked" {
			t.Errorf("%q", f.Decision.Masquerade)
		}
	})
	t.Run("reason without mark", func(t *testing.T) {
		l := newLab(t, nil)
		l.conn(foo, "10.9.8.7:40000", ep2).pick()
		if f := l.only(); f.Decision.Masquerade != "no" {
			t.Errorf("%q", f.Decision.Masquerade)
		}
	})
	t.Run("from the node", func(t *testing.T) {
		l := newLab(t, nil)
		k := l.conn(foo, "10.1.0.1:40000", ep2)
		k.masq, k.local = true, true
		k.started = l.now
		l.pass(8 * ms) // read late, as OUTPUT has no kernel time
		k.pick().new()
		l.now -= int64(6 * ms)
		k.synack()
		f := l.only()
		if f.Decision.Masquerade != "not-local" || f.Client.Node != "node1" || !f.Start.Equal(epoch) || f.Established != 2*ms {
			t.Errorf("%q %+v start %v established %v", f.Decision.Masquerade, f.Client, f.Start, f.Established)
		}
	})
	t.Run("older view", func(t *testing.T) {
		l := newLab(t, nil)
		m := endpoints()
		m[foo] = m[foo][:1]
		l.views = append([]*viewT{view(epoch.Add(-ms), &l.walks, m)}, l.views...)
		l.conn(foo, pod, ep2).pick()
		if f := l.only(); f.Decision.Candidates != 2 || f.Decision.Note != "" {
			t.Errorf("%+v", f.Decision)
		}
	})
	t.Run("view in force", func(t *testing.T) {
		l := newLab(t, nil)
		m := endpoints()
		m[foo] = append(m[foo], ep3)
		l.views = append([]*viewT{view(epoch.Add(time.Second), &l.walks, m)}, l.views...)
		k := l.conn(foo, pod, ep2)
		k.pick()
		if f := l.only(); f.Decision.Candidates != 2 {
			t.Errorf("%d candidates before the new view", f.Decision.Candidates)
		}
		l.pass(2 * time.Second)
		k.isn++
		k.pick()
		if f := l.updates[len(l.updates)-1]; f.Decision.Candidates != 3 {
			t.Errorf("%d candidates after it", f.Decision.Candidates)
		}
	})
	t.Run("endpoint nobody knows", func(t *testing.T) {
		l := newLab(t, nil)
		l.conn(foo, pod, ap("10.244.9.9:1")).pick()
		if f := l.only(); !f.Decision.Known || f.Decision.Note == "" || f.Decision.Probability != 0 {
			t.Errorf("%+v", f.Decision)
		}
	})
	t.Run("no views", func(t *testing.T) {
		l := newLab(t, nil)
		l.views = nil
		l.conn(foo, pod, ep2).pick()
		if f := l.only(); f.Service.Name != foo || f.Backend.Addr != ep2 {
			t.Errorf("%+v", f)
		}
	})
	t.Run("pick not seen", func(t *testing.T) {
		l := newLab(t, nil)
		l.conn(foo, pod, ep2).new()
		if len(l.flows) != 0 {
			t.Fatal("shown before the hold was over")
		}
		l.wait(300 * ms)
		f := l.only()
		if f.Decision.Known || f.Decision.Note != "pick not seen" || f.Service.Name != foo || f.Backend.Pod != "foo-b" || f.Existing {
			t.Errorf("%+v", f)
		}
	})
	t.Run("foreign", func(t *testing.T) {
		l := newLab(t, nil)
		k := l.conn(foo, pod, ep2)
		k.synack()
		e := k.ct(trace.KindNew)
		e.Tuple = conntrack.NewTuple(conntrack.TCP, ap(pod), ap("192.0.2.1:443"))
		l.c.Handle(e)
		e.Reply = e.Tuple.Reverse()
		l.c.Handle(e)
		l.wait(time.Second)
		s := l.c.Stats()
		if len(l.updates) != 0 || s.Foreign != 2 || s.Untranslated != 1 || s.Open != 0 || s.Held != 0 {
			t.Errorf("%d updates, stats %+v", len(l.updates), s)
		}
	})
}

func TestExisting(t *testing.T) {
	l := newLab(t, nil)
	k := l.conn(foo, pod, ep2)
	k.entry(answered, state(conntrack.TCPEstablished), packets(3, 3))
	over := l.conn(foo, "10.244.1.5:50000", ep2)
	over.entry(answered, state(conntrack.TCPTimeWait))
	l.wait(300 * ms)
	f := l.only()
	if !f.Existing || f.Decision.Known || f.Decision.Note != "before start" || f.Outcome != trace.Open || f.Service.Name != foo {
		t.Fatalf("%+v", f)
	}
	n := 0
	l.c.Flows(func(*trace.Flow) bool { n++; return true })
	if n != 1 {
		t.Errorf("%d flows listed", n)
	}
	k.finOut().finIn()
	l.wait(time.Second)
	want{outcome: trace.Closed, ended: true, try: "established"}.check(t, l.only())

	// One that was picked while the dump ran is no old one.
	l = newLab(t, nil)
	k = l.conn(foo, pod, ep2)
	k.entry(answered, state(conntrack.TCPEstablished)).pick().new().synack()
	l.wait(time.Second)
	if f := l.only(); f.Existing || !f.Decision.Known || f.Outcome != trace.Open {
		t.Errorf("%+v", f)
	}
	// Start known from the kernel.
	l = newLab(t, nil)
	k = l.conn(foo, pod, ep2)
	k.entry(answered, state(conntrack.TCPEstablished), func(e *trace.Event) { e.Start = epoch.Add(-time.Hour).UnixNano() })
	l.wait(time.Second)
	k.finIn()
	l.wait(time.Second)
	if f := l.only(); !f.Existing || !f.Start.Equal(epoch.Add(-time.Hour)) || f.Duration != time.Hour+time.Second {
		t.Errorf("existing %v start %v duration %v", f.Existing, f.Start, f.Duration)
	}
}

func TestAsk(t *testing.T) {
	end := func(t *testing.T, answer func(*conn)) (*lab, *trace.Flow) {
		l := newLab(t, nil)
		l.canAsk = true
		k := l.conn(foo, pod, ep2)
		k.pick().new()
		l.pass(ms)
		k.synack()
		l.pass(ms)
		k.finOut().finIn()
		l.wait(60 * ms)
		if len(l.asked) != 1 || l.only().Ended {
			t.Fatalf("asked %d, ended %v", len(l.asked), l.only().Ended)
		}
		answer(k)
		return l, l.only()
	}
	l, f := end(t, func(k *conn) { k.entry(answered, state(conntrack.TCPTimeWait), packets(6, 5)) })
	want{outcome: trace.Closed, ended: true, est: ms, dur: 2 * ms, counted: true}.check(t, f)
	if l.wait(time.Second); len(l.updates) != 3 || l.c.Stats().Ended != 0 {
		t.Errorf("%d updates, %+v", len(l.updates), l.c.Stats())
	}
	_, f = end(t, func(k *conn) { k.gone() })
	want{outcome: trace.Closed, ended: true, est: ms, dur: 2 * ms}.check(t, f)
	_, f = end(t, func(k *conn) { k.l.wait(300 * ms) })
	want{outcome: trace.Closed, ended: true, est: ms, dur: 2 * ms}.check(t, f)
	// Half closed: the counters may grow, and DESTROY has the last word.
	l, f = end(t, func(k *conn) {
		k.entry(answered, state(conntrack.TCPFinWait), packets(6, 5))
		k.l.wait(time.Second)
		k.destroy(answered, packets(9, 9))
	})
	if l.wait(50 * ms); f.Out.Packets != 9 || !f.Counted || l.c.Stats().Ended != 0 {
		t.Errorf("%+v", f.Out)
	}

	// A DESTROY that was lost: the silent flow is asked about.
	l = newLab(t, nil)
	l.canAsk = true
	k := l.conn(foo, pod, ep2)
	k.pick().new()
	l.pass(ms)
	k.synack()
	l.wait(50 * time.Second)
	if len(l.asked) != 1 { // after a second, for what it has sent
		t.Fatalf("asked %d times in 50 s", len(l.asked))
	}
	l.wait(20 * time.Second)
	if len(l.asked) != 2 {
		t.Fatalf("asked %d times in 70 s", len(l.asked))
	}
	k.entry(answered, packets(2, 2))
	l.wait(120 * time.Second)
	if len(l.asked) != 3 {
		t.Fatalf("asked %d times in 190 s", len(l.asked))
	}
	k.gone()
	l.wait(time.Second)
	want{outcome: trace.Unknown, missing: "fin not seen", ended: true, est: ms}.check(t, l.only())

	// UDP is asked about when its entry should be gone.
	l = newLab(t, nil)
	l.canAsk = true
	k = l.conn(dns, pod, ep2)
	k.pick().new()
	l.pass(ms)
	k.answer()
	l.wait(32 * time.Second)
	k.entry(answered, func(e *trace.Event) { e.Timeout = 20 })
	l.wait(15 * time.Second)
	if len(l.asked) != 1 {
		t.Fatalf("asked %d times", len(l.asked))
	}
	l.wait(10 * time.Second)
	k.gone()
	l.wait(time.Second)
	want{outcome: trace.Closed, ended: true, est: ms, dur: ms}.check(t, l.only())

	// An unanswered datagram whose entry is gone timed out.
	l = newLab(t, nil)
	l.canAsk = true
	k = l.conn(dns, pod, ep2)
	k.pick().new()
	l.wait(32 * time.Second)
	k.gone()
	l.wait(time.Second)
	want{outcome: trace.Timeout, reason: trace.NoReply, ended: true}.check(t, l.only())
}

func TestTables(t *testing.T) {
	l := newLab(t, func(c *correlate.Config) { c.MaxFlows = 10 })
	k := l.conn(foo, pod, ep2)
	for i := range 25 {
		k.src = addrPort(k.src, uint16(1000+i))
		k.pick().new().synack()
		l.pass(ms)
	}
	l.wait(50 * ms)
	s := l.c.Stats()
	if s.Open != 10 || s.Evicted != 15 || s.Outcomes[trace.Unknown] != 15 {
		t.Errorf("%+v", s)
	}
	gone := 0
	for _, f := range l.flows {
		if f.Ended {
			gone++
			if f.Outcome != trace.Unknown || f.Missing != "evicted: the flow table was full" {
				t.Errorf("%s, missing %q", f.Outcome, f.Missing)
			}
		}
	}
	if gone != 15 {
		t.Errorf("%d flows evicted", gone)
	}
	// Ended ones go first.
	k.src = addrPort(k.src, 1020)
	k.finOut().finIn()
	l.wait(100 * ms)
	k.src = addrPort(k.src, 5000)
	k.pick()
	l.wait(50 * ms)
	if s := l.c.Stats(); s.Evicted != 15 || s.Uncounted != 1 || s.Open != 10 || s.Ended != 0 {
		t.Errorf("%+v", s)
	}
	// Ended flows do not stay for ever.
	l = newLab(t, nil)
	k = l.conn(foo, pod, ep2)
	k.pick().new().rstIn()
	l.conn(empty, pod, ep2).refuse(trace.KindReject, "no-endpoints")
	l.wait(time.Second)
	if s := l.c.Stats(); s.Ended != 2 {
		t.Errorf("%+v", s)
	}
	l.wait(6 * time.Minute)
	if s := l.c.Stats(); s.Ended != 0 || s.Open != 0 || s.Uncounted != 1 {
		t.Errorf("%+v", s)
	}
}

// TestNewAfterTheEnd has the answer to a question come before the NEW of the
// same entry, as on a machine that is short of CPU: one connection, one flow.
func TestNewAfterTheEnd(t *testing.T) {
	for _, masq := range []bool{false, true} {
		l := newLab(t, nil)
		l.canAsk = true
		k := l.conn(foo, pod, ep2)
		k.masq = masq
		began := l.now
		k.pick()
		l.pass(ms)
		k.synack()
		l.pass(ms)
		k.finOut().finIn()
		l.wait(60 * ms)
		k.entry(answered, state(conntrack.TCPTimeWait), packets(6, 5))
		l.wait(300 * ms)
		e := k.ct(trace.KindNew)
		e.Time, e.KernelTime = began, true
		k.send(e)
		l.wait(2 * time.Second)
		f := l.only()
		if f.Outcome != trace.Closed || !f.Ended || !f.Counted {
			t.Errorf("masqueraded %v: %s, ended %v, counted %v", masq, f.Outcome, f.Ended, f.Counted)
		}
		if st := l.c.Stats(); st.Open != 0 || st.Ended != 0 {
			t.Errorf("masqueraded %v: records stay: %+v", masq, st)
		}
	}
}

// TestDestroyOfTheOneBefore reuses a port on a machine short of CPU: the old
// entry's DESTROY and the new one's NEW come when all else is over.
func TestDestroyOfTheOneBefore(t *testing.T) {
	l := newLab(t, nil)
	l.canAsk = true
	whole := func(k *conn) {
		k.pick()
		l.pass(ms)
		k.synack()
		l.pass(ms)
		k.finOut().finIn()
		l.wait(60 * ms)
		k.entry(answered, state(conntrack.TCPTimeWait), packets(6, 5))
		l.wait(300 * ms)
	}
	first := l.conn(foo, pod, ep2)
	first.new()
	whole(first)
	second := l.conn(foo, pod, ep1)
	second.src, second.isn = first.src, first.isn+99
	began := l.now
	whole(second)
	first.destroy(answered, packets(6, 5))
	e := second.ct(trace.KindNew)
	e.Time, e.KernelTime = began, true
	second.send(e)
	l.wait(5 * time.Second)
	if len(l.flows) != 2 {
		for _, f := range l.flows {
			t.Logf("%v %s id %d %s", f.Tuple, f.Outcome, f.CTID, f.Decision.Note)
		}
		t.Fatalf("%d flows of 2 connections", len(l.flows))
	}
	for _, f := range l.flows {
		if f.Outcome != trace.Closed || !f.Decision.Known {
			t.Errorf("%v: %s, decision known %v", f.Tuple, f.Outcome, f.Decision.Known)
		}
	}
}

package correlate_test

import (
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// byISN returns the flows in the order of their start.
func (l *lab) inOrder() []*trace.Flow {
	var all []*trace.Flow
	for _, f := range l.flows {
		at := len(all)
		for at > 0 && all[at-1].ID > f.ID {
			at--
		}
		all = append(all[:at], append([]*trace.Flow{f}, all[at:]...)...)
	}
	return all
}

func TestPortReuse(t *testing.T) {
	// Two connections on one tuple, close together: the first is refused, the
	// second works. Their entries come before, after and in between.
	orders := map[string][]string{
		"nflog first":     {"pickA", "rstA", "pickB", "synackB", "newA", "destroyA", "newB"},
		"conntrack first": {"newA", "destroyA", "newB", "pickA", "rstA", "pickB", "synackB"},
		"in step":         {"pickA", "newA", "rstA", "destroyA", "pickB", "newB", "synackB"},
		"mixed":           {"pickA", "newA", "rstA", "pickB", "destroyA", "synackB", "newB"},
		"mixed too":       {"newA", "pickA", "destroyA", "newB", "rstA", "pickB", "synackB"},
	}
	for name, steps := range orders {
		for _, masq := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				l := newLab(t, nil)
				a := l.conn(foo, pod, ep1)
				b := l.conn(foo, pod, ep2)
				b.isn = 5000
				a.masq, b.masq = masq, masq
				do := map[string]func() *conn{
					"pickA": a.pick, "newA": a.new, "rstA": a.rstIn,
					"destroyA": func() *conn { return a.destroy(early, packets(1, 1), state(conntrack.TCPClose)) },
					"pickB":    b.pick, "newB": b.new, "synackB": b.synack,
				}
				for _, s := range steps {
					do[s]()
				}
				l.wait(900 * ms)
				got := l.inOrder()
				if len(got) != 2 {
					t.Fatalf("%d flows", len(got))
				}
				f, g := got[0], got[1]
				if f.Outcome != trace.Refused || !f.Ended || !f.Counted || f.Backend.Addr != ep1 || f.Missing != "" {
					t.Errorf("first: %s %s ended %v counted %v", f.Outcome, f.Missing, f.Ended, f.Counted)
				}
				if g.Outcome != trace.Open || g.Ended || g.Counted || g.Backend.Addr != ep2 || g.Reply != b.reply() {
					t.Errorf("second: %s ended %v counted %v reply %v", g.Outcome, g.Ended, g.Counted, g.Reply)
				}
				if s := l.c.Stats(); s.Open != 1 || s.Ended != 0 || s.Late+s.Foreign != 0 {
					t.Errorf("%+v", s)
				}
			})
		}
	}
}

func TestSuccession(t *testing.T) {
	l := newLab(t, nil)
	a := l.conn(foo, pod, ep1)
	a.pick().new()
	l.pass(ms)
	a.synack()
	l.wait(time.Second)
	b := l.conn(foo, pod, ep2)
	b.isn = 2
	b.pick().synack()
	got := l.inOrder()
	want{outcome: trace.Unknown, missing: "the end: another connection took the tuple", ended: true, est: ms}.check(t, got[0])
	// The DESTROY of the first comes late and must not end the second.
	a.destroy(answered, packets(4, 4))
	b.new()
	l.wait(time.Second)
	got = l.inOrder()
	if !got[0].Counted || got[1].Ended || got[1].Counted {
		t.Errorf("counted %v; second ended %v counted %v", got[0].Counted, got[1].Ended, got[1].Counted)
	}
	// A closed connection in TIME_WAIT whose port is used again.
	b.finOut().finIn()
	l.wait(time.Second)
	c := l.conn(foo, pod, ep1)
	c.isn = 3
	c.pick()
	b.destroy(answered, packets(7, 7))
	c.new().synack()
	l.wait(time.Second)
	got = l.inOrder()
	if len(got) != 3 || got[1].Out.Packets != 7 || got[2].Outcome != trace.Open || got[2].Counted {
		t.Errorf("%d flows: %+v", len(got), got)
	}
	// An unanswered one whose client begins anew.
	d := l.conn(dns, pod, ep1)
	d.pick().new()
	l.wait(5 * time.Second)
	d.pick()
	if f := l.inOrder()[3]; f.Outcome != trace.Timeout || f.Reason != trace.NoReply {
		t.Errorf("%s %s", f.Outcome, f.Reason)
	}
	// Generations of one tuple are bounded.
	e := l.conn(foo, "10.244.1.9:1", ep1)
	for i := range 20 {
		e.isn = uint32(i)
		e.pick()
	}
	l.wait(50 * ms)
	if s := l.c.Stats(); s.Open+s.Ended > 16 {
		t.Errorf("%+v", s)
	}
}

func TestRetry(t *testing.T) {
	for _, masq := range []bool{false, true} {
		for _, newFirst := range []bool{false, true} {
			l := newLab(t, nil)
			a := l.conn(foo, pod, ep1)
			a.masq = masq
			a.pick().new()
			l.wait(1010 * ms)
			if f := l.only(); f.Outcome != trace.Unanswered {
				t.Errorf("%s before the retry", f.Outcome)
			}
			a.destroy(early)
			b := l.conn(foo, pod, ep2)
			b.masq = masq
			if newFirst {
				b.new().pick()
			} else {
				b.pick().new()
			}
			l.pass(ms)
			b.synack()
			l.wait(time.Second)
			f := l.only()
			want{outcome: trace.Open, est: 1011 * ms, tries: 2, try: "established"}.check(t, f)
			if f.Backend.Addr != ep2 || !f.Retried() || f.Attempts[0].Outcome != "unanswered" || f.Attempts[0].Endpoint.Addr != ep1 ||
				f.Attempts[1].Latency != ms || !f.Attempts[1].Start.Equal(epoch.Add(1010*ms)) || f.Reply != b.reply() {
				t.Errorf("masq %v new first %v: %+v", masq, newFirst, f)
			}
			b.finOut().finIn()
			l.wait(time.Second)
			b.destroy(answered, packets(3, 3))
			if f := l.only(); f.Outcome != trace.Closed || f.Out.Packets != 3 {
				t.Errorf("%+v", f)
			}
		}
	}
	// The DESTROY of the first entry comes after the second pick.
	l := newLab(t, nil)
	a := l.conn(foo, pod, ep1)
	a.pick().new()
	l.wait(1010 * ms)
	b := l.conn(foo, pod, ep2)
	b.pick()
	a.destroy(early)
	b.new().synack()
	l.wait(time.Second)
	want{outcome: trace.Open, est: 1010 * ms, tries: 2, try: "established"}.check(t, l.only())
}

func TestUDPRace(t *testing.T) {
	// Two datagrams decide at once; the entry of the second wins.
	l := newLab(t, nil)
	a := l.conn(dns, pod, ep1)
	a.pick()
	b := l.conn(dns, pod, ep2)
	b.pick().new()
	l.pass(ms)
	b.answer()
	l.wait(time.Second)
	f := l.only()
	if f.Outcome != trace.Open || f.Backend.Addr != ep2 || f.Reply != b.reply() {
		t.Errorf("%s %v", f.Outcome, f.Backend)
	}
	// The entry of the first wins.
	l = newLab(t, nil)
	a = l.conn(dns, pod, ep1)
	a.pick().new()
	b = l.conn(dns, pod, ep2)
	b.pick()
	a.answer()
	l.wait(time.Second)
	if f := l.only(); f.Outcome != trace.Open || f.Backend.Addr != ep1 || len(f.Attempts) != 1 {
		t.Errorf("%s %v", f.Outcome, f.Backend)
	}
}

func TestLoss(t *testing.T) {
	loss := func(l *lab, s trace.SourceID) {
		l.c.Lost(trace.Loss{Source: s, From: l.now - int64(ms), To: l.now, Events: 1, Where: "kernel"})
	}
	l := newLab(t, nil)
	k := l.conn(foo, pod, ep2)
	k.pick().new()
	l.pass(10 * ms)
	loss(l, trace.NFLog)
	l.wait(2 * time.Second)
	f := l.only()
	want{outcome: trace.Unknown, missing: "the answer: events were lost"}.check(t, f)
	if !f.Incomplete {
		t.Error("not incomplete")
	}
	// A further SYN proves that nothing answered.
	k.syn()
	want{outcome: trace.Unanswered, reason: trace.SynUnanswered, try: "unanswered", retx: 1}.check(t, l.only())

	// The entry proves that something did.
	l = newLab(t, nil)
	l.canAsk = true
	k = l.conn(foo, pod, ep2)
	k.pick().new()
	l.pass(10 * ms)
	loss(l, trace.NFLog)
	l.wait(2 * time.Second)
	if len(l.asked) == 0 {
		t.Fatal("not asked")
	}
	k.entry(answered, state(conntrack.TCPEstablished))
	want{outcome: trace.Open}.check(t, l.only())

	// Nobody is incomplete for what was lost before or after.
	l = newLab(t, nil)
	loss(l, trace.NFLog)
	l.pass(10 * ms)
	k = l.conn(foo, pod, ep2)
	k.pick().new()
	l.pass(ms)
	k.rstIn()
	l.pass(10 * ms)
	loss(l, trace.NFLog)
	l.wait(time.Second)
	if f := l.only(); f.Incomplete || f.Outcome != trace.Refused {
		t.Errorf("%s incomplete %v", f.Outcome, f.Incomplete)
	}
	// NEW lost: the DESTROY still counts.
	l = newLab(t, nil)
	k = l.conn(foo, pod, ep2)
	k.pick()
	loss(l, trace.Conntrack)
	l.pass(ms)
	k.synack().finOut().finIn()
	l.wait(time.Second)
	k.destroy(answered, packets(4, 4))
	if f := l.only(); !f.Counted || !f.Incomplete || f.Outcome != trace.Closed {
		t.Errorf("%s counted %v incomplete %v", f.Outcome, f.Counted, f.Incomplete)
	}
	// A great many losses.
	for range 1000 {
		l.pass(ms)
		loss(l, trace.NFLog)
	}
	k.isn++
	k.pick()
	if f := l.inOrder()[1]; !f.Incomplete {
		t.Error("not incomplete after many losses")
	}
	if s := l.c.Stats(); s.Losses != 1001 {
		t.Errorf("%d losses", s.Losses)
	}
	// What a reader missed is no evidence.
	l = newLab(t, nil)
	k = l.conn(foo, pod, ep2)
	l.c.Lost(trace.Loss{From: l.now, To: l.now, Where: "ring"})
	k.pick()
	if l.only().Incomplete {
		t.Error("incomplete for a reader's loss")
	}
	// A reset whose SYN-ACK was lost is no refusal.
	l = newLab(t, nil)
	k = l.conn(foo, pod, ep2)
	k.pick().new()
	l.pass(ms)
	e := k.event(trace.KindRst, k.reply())
	e.TCPSeq, e.TCPAck = 777, k.isn+500
	l.c.Handle(e)
	l.wait(time.Second)
	want{outcome: trace.Reset, reason: trace.ResetByEndpoint, ended: true, dur: ms, try: "reset"}.check(t, l.only())
}

package correlate_test

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

// inIPVS makes the lab's rules those of the IPVS mode.
func inIPVS(l *lab, scheduler string) *lab {
	v := *l.views[0]
	v.Mode = proxy.IPVS
	v.Program = &ipvsProgram{v.Program.(*program), scheduler}
	l.views = []*proxy.View{&v}
	return l
}

type ipvsProgram struct {
	*program
	scheduler string
}

func (p *ipvsProgram) Walk(x proxy.Packet) proxy.Outcome {
	o := p.program.Walk(x)
	if o.Verdict == proxy.Forward {
		o.Algorithm = p.scheduler
	}
	for i := range o.Choices {
		o.Choices[i].Probability = 0
	}
	return o
}

var (
	virtualRule   = &proxy.Rule{Tag: proxy.Tag{Kind: proxy.TagSyn, ID: proxy.IDVirtual}}
	scheduledRule = &proxy.Rule{Tag: proxy.Tag{Kind: proxy.TagPick, ID: proxy.IDScheduled}}
)

// vip is a first packet, or a SYN sent again, before IPVS.
func (k *conn) vip() *conn {
	e := k.event(trace.KindSyn, k.orig())
	e.Rule = virtualRule
	k.send(e)
	return k
}

// ipvs is the same packet behind IPVS, before its source is translated.
func (k *conn) ipvs() *conn {
	e := k.event(trace.KindPick, conntrack.NewTuple(k.service.Proto, k.src, k.ep))
	e.Rule, e.Hook, e.KernelTime = scheduledRule, 4, false
	if k.masq {
		e.Mark = 0x4000
	}
	k.send(e)
	return k
}

func TestIPVS(t *testing.T) {
	open := want{outcome: trace.Open, est: 2 * ms, try: "established"}
	for _, tc := range []struct {
		name     string
		masq     bool
		ep       netip.AddrPort
		run      func(l *lab, k *conn)
		want     want
		tried    []netip.AddrPort
		noChoice bool
	}{
		{name: "picked and answered", run: func(l *lab, k *conn) {
			k.vip().ipvs().new()
			l.pass(2 * ms)
			k.synack()
		}, want: open, tried: []netip.AddrPort{ep1}},
		{name: "masqueraded", masq: true, run: func(l *lab, k *conn) {
			k.vip().ipvs()
			l.pass(2 * ms)
			k.synack().new()
		}, want: open, tried: []netip.AddrPort{ep1}},
		{name: "the first report was lost", run: func(l *lab, k *conn) {
			k.new()
			k.ipvs()
			l.pass(2 * ms)
			k.synack()
		}, want: open, tried: []netip.AddrPort{ep1}},
		{name: "sent again to the same server", run: func(l *lab, k *conn) {
			k.vip().ipvs().new()
			l.wait(1000 * ms)
			k.vip().ipvs()
			l.wait(500 * ms)
		}, want: want{outcome: trace.Unanswered, reason: trace.SynUnanswered, try: "unanswered", retx: 1}, tried: []netip.AddrPort{ep1}},
		{name: "dropped once, then sent again", run: func(l *lab, k *conn) {
			k.vip().ipvs().new()
			l.wait(1000 * ms)
			k.vip()
			l.wait(2000 * ms)
			k.vip().ipvs()
		}, want: want{outcome: trace.Unanswered, reason: trace.SynUnanswered, try: "unanswered", retx: 2}, tried: []netip.AddrPort{ep1}},
		{name: "retried at another server", run: func(l *lab, k *conn) {
			k.vip().ipvs().new()
			l.wait(1000 * ms)
			k.destroy(early) // weight 0, entry deleted
			k.ep, k.ctid = ep2, 8
			l.pass(10 * ms)
			k.vip().ipvs().new()
			l.pass(1 * ms)
			k.synack()
			l.wait(100 * ms)
		}, want: want{outcome: trace.Open, est: 1011 * ms, tries: 2, try: "established"}, tried: []netip.AddrPort{ep1, ep2}},
		{name: "the server remembers an older connection, and the SYN sent again goes elsewhere", run: func(l *lab, k *conn) {
			k.vip().ipvs().new()
			l.pass(1 * ms)
			k.rstOut()
			l.wait(20 * ms)
			k.destroy(packets(2, 0))
			k.ep, k.ctid = ep2, 8
			k.vip().ipvs().new()
			l.pass(1 * ms)
			k.synack()
			l.wait(100 * ms)
		}, want: want{outcome: trace.Open, est: 22 * ms, tries: 2, try: "established"}, tried: []netip.AddrPort{ep1, ep2}},
		{name: "the pick comes late, as after a standstill", run: func(l *lab, k *conn) {
			k.vip()
			l.pass(time.Second)
			l.c.Advance(time.Unix(0, l.now))
			l.now -= int64(time.Second)
			k.ipvs().new()
			l.pass(2 * ms)
			k.synack()
			l.wait(2 * time.Second)
		}, want: open, tried: []netip.AddrPort{ep1}},
		{name: "no server", run: func(l *lab, k *conn) {
			l.c.Handle(&trace.Event{Kind: trace.KindServer, Source: trace.IPVS, Time: l.now, Tuple: conntrack.NewTuple(conntrack.TCP, ep1, ap(vips[foo]))})
			k.vip()
			l.wait(1200 * ms)
			k.vip()
			l.wait(2 * time.Second)
		}, want: want{outcome: trace.Rejected, reason: trace.NoEndpoints, ended: true}, noChoice: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := inIPVS(newLab(t, nil), "rr")
			k := l.conn(foo, pod, ep1)
			if k.masq = tc.masq; tc.masq {
				k.src = ap("192.0.2.9:40000")
			}
			tc.run(l, k)
			f := l.only()
			tc.want.check(t, f)
			if f.Service.Name != foo || f.Service.Via != proxy.ViaClusterIP || f.Decision.Mode != proxy.IPVS {
				t.Errorf("service %+v, mode %q", f.Service, f.Decision.Mode)
			}
			if tc.noChoice {
				return
			}
			if f.Decision.Algorithm != "rr" || f.Decision.Candidates != 2 || f.Decision.Probability != 0 {
				t.Errorf("decision %+v", f.Decision)
			}
			if f.Tuple != k.orig() || f.Backend.Addr != k.ep || (f.Decision.Masquerade == "no") == tc.masq {
				t.Errorf("tuple %v, backend %v, masquerade %q", f.Tuple, f.Backend.Addr, f.Decision.Masquerade)
			}
			var tried []netip.AddrPort
			for _, a := range f.Attempts {
				tried = append(tried, a.Endpoint.Addr)
			}
			if !slices.Equal(tried, tc.tried) {
				t.Errorf("tried %v, want %v", tried, tc.tried)
			}
		})
	}
}

// A UDP client's datagrams are each reported until the first answer.
func TestIPVSDatagrams(t *testing.T) {
	l := inIPVS(newLab(t, nil), "rr")
	k := l.conn(dns, pod, ep1)
	k.isn = 0
	k.vip().ipvs().new()
	l.wait(300 * ms)
	k.vip().ipvs()
	l.pass(2 * ms)
	k.answer()
	f := l.only()
	if f.Outcome != trace.Open || len(f.Attempts) != 1 || f.Attempts[0].Retransmits != 0 {
		t.Errorf("%s %+v", f.Outcome, f.Attempts)
	}
}

func TestIPVSPersistence(t *testing.T) {
	l := inIPVS(newLab(t, nil), "rr")
	port := uint16(40000)
	connect := func(from string, ep netip.AddrPort, word trace.Affinity, age time.Duration) {
		t.Helper()
		port++
		k := l.conn(sticky, netip.AddrPortFrom(netip.MustParseAddr(from), port).String(), ep)
		k.vip().ipvs()
		d := l.updates[len(l.updates)-1].Decision
		if d.Affinity != word || d.AffinityAge != age || d.AffinityTimeout != 10*time.Second {
			t.Errorf("affinity %q %v of %v, want %q %v", d.Affinity, d.AffinityAge, d.AffinityTimeout, word, age)
		}
	}
	connect("10.244.1.5", ep1, trace.AffinityNew, 0)
	l.wait(4 * time.Second)
	connect("10.244.1.5", ep1, trace.AffinityHit, 4*time.Second)
	l.wait(11 * time.Second)
	connect("10.244.1.5", ep2, trace.AffinityExpired, 11*time.Second)
	l.wait(time.Second)
	connect("10.244.1.5", ep1, trace.AffinityReset, 0)

	// A template is in the sample that this connection made.
	newTemplate := func(client string) {
		a := netip.AddrPortFrom(netip.MustParseAddr(client), 0)
		l.c.Handle(&trace.Event{Kind: trace.KindTemplate, Source: trace.IPVS, Time: l.now + int64(200*ms),
			Tuple: conntrack.NewTuple(conntrack.TCP, a, ap(vips[sticky])), Reply: conntrack.NewTuple(conntrack.TCP, ep1, a),
			IPVS: trace.IPVSSample{Left: 10}})
	}
	newTemplate("10.244.1.7")
	connect("10.244.1.7", ep1, trace.AffinityNew, 0)

	// A template older than we are.
	left := func(client string, ep netip.AddrPort, s uint32) {
		a := netip.AddrPortFrom(netip.MustParseAddr(client), 0)
		l.c.Handle(&trace.Event{Kind: trace.KindTemplate, Source: trace.IPVS, Time: l.now,
			Tuple: conntrack.NewTuple(conntrack.TCP, a, ap(vips[sticky])), Reply: conntrack.NewTuple(conntrack.TCP, ep, a),
			IPVS: trace.IPVSSample{Left: s}})
	}
	left("10.244.1.6", ep2, 7)
	l.pass(time.Second)
	connect("10.244.1.6", ep2, trace.AffinityHit, 4*time.Second)
}

// The table of IPVS is told of while the connection lasts.
func TestIPVSState(t *testing.T) {
	l := inIPVS(newLab(t, nil), "rr")
	k := l.conn(foo, pod, ep1)
	k.vip().ipvs().new()
	k.synack()
	state := func(ep netip.AddrPort, word string) {
		l.c.Handle(&trace.Event{Kind: trace.KindState, Source: trace.IPVS, Time: l.now, Tuple: k.orig(),
			Reply: conntrack.NewTuple(conntrack.TCP, ep, k.src), IPVS: trace.IPVSSample{State: trace.ParseIPVSState([]byte(word))}})
		l.wait(2 * time.Second)
	}
	for range 3 {
		state(ep1, "ESTABLISHED")
	}
	state(ep2, "SYN_RECV") // of an entry before
	n := len(l.updates)
	f := l.only()
	if f.IPVSState.String() != "ESTABLISHED" || !f.Evidence.Has(trace.IPVS) {
		t.Errorf("state %q, evidence %v", f.IPVSState, f.Evidence.Names())
	}
	state(ep1, "ESTABLISHED")
	if len(l.updates) != n {
		t.Errorf("a sample that says nothing new makes an update")
	}
}

// What a scheduler looks at is shown, as old as it is.
func TestIPVSLoad(t *testing.T) {
	l := inIPVS(newLab(t, nil), "lc")
	sample := func(ep netip.AddrPort, active, weight uint32) {
		l.c.Handle(&trace.Event{Kind: trace.KindServer, Source: trace.IPVS, Time: l.now,
			Tuple: conntrack.NewTuple(conntrack.TCP, ep, ap(vips[foo])), IPVS: trace.IPVSSample{Active: active, Weight: weight}})
	}
	sample(ep1, 5, 1)
	sample(ep2, 2, 1)
	sample(ep3, 7, 1)
	l.pass(1500 * ms)
	l.conn(foo, pod, ep2).vip().ipvs()
	want := trace.Load{Age: 1500 * ms, Picked: 1, Servers: []trace.ServerLoad{
		{Addr: ep1, Active: 5, Weight: 1}, {Addr: ep2, Active: 2, Weight: 1}, {Addr: ep3, Active: 7, Weight: 1}}}
	got := l.only().Decision.Load
	if got == nil || got.Age != want.Age || got.Picked != want.Picked || !slices.Equal(got.Servers, want.Servers) {
		t.Errorf("load %+v, want %+v", got, want)
	}
	l.pass(20 * time.Second)
	l.conn(foo, "10.244.1.5:40001", ep1).vip().ipvs()
	if got := l.updates[len(l.updates)-1].Decision.Load; got != nil {
		t.Errorf("an old sample is shown: %+v", got)
	}
}

// TestNotScheduledHasServers sends packets to a virtual server that no pick follows:
// it is for want of endpoints where IPVS is known to have had none to pick.
func TestNotScheduledHasServers(t *testing.T) {
	for name, tc := range map[string]struct {
		weights []uint32
		old     time.Duration
		outcome trace.Outcome
		reason  trace.Reason
	}{
		"a server with weight":       {[]uint32{1}, 0, trace.Dropped, trace.DroppedOnNode},
		"one of two has weight":      {[]uint32{0, 1}, 0, trace.Dropped, trace.DroppedOnNode},
		"weights are 0":              {[]uint32{0, 0}, 0, trace.Rejected, trace.NoEndpoints},
		"weights were 0 a while ago": {[]uint32{0, 0}, time.Minute, trace.Dropped, trace.DroppedOnNode},
		"nothing was sampled":        {nil, 0, trace.Dropped, trace.DroppedOnNode},
	} {
		t.Run(name, func(t *testing.T) {
			l := inIPVS(newLab(t, nil), "rr")
			k := l.conn(foo, pod, ep1)
			for i, w := range tc.weights {
				l.c.Handle(&trace.Event{Kind: trace.KindServer, Source: trace.IPVS, Time: l.now,
					Tuple: conntrack.NewTuple(conntrack.TCP, []netip.AddrPort{ep1, ep2}[i], ap(vips[foo])), IPVS: trace.IPVSSample{Weight: w}})
			}
			l.pass(tc.old)
			k.vip()
			l.wait(2 * time.Second)
			if f := l.only(); f.Outcome != tc.outcome || f.Reason != tc.reason {
				t.Errorf("%s %s, want %s %s", f.Outcome, f.Reason, tc.outcome, tc.reason)
			}
		})
	}
}

// TestStayedBehindIPVS has packets be dropped after IPVS has picked, and answers lost.
func TestStayedBehindIPVS(t *testing.T) {
	var asked []correlate.Inquiry
	l := inIPVS(newLab(t, func(c *correlate.Config) { c.Inquire = func(i correlate.Inquiry) { asked = append(asked, i) } }), "rr")
	k := l.conn(foo, pod, ep1).vip().ipvs()
	l.wait(1000 * ms)
	k.vip().ipvs()
	l.wait(100 * ms)
	l.failedFor(trace.DroppedOnNode, "")
	if len(asked) != 1 || asked[0].Flow.Backend.Addr != ep1 {
		t.Fatalf("asked %+v", asked)
	}
	l.c.Explain(asked[0].Flow.ID, asked[0].Flow.Tuple, trace.SourcePorts, "all")
	l.failedFor(trace.SourcePorts, "all")

	asked, l.flows = nil, map[trace.FlowID]*trace.Flow{}
	k = l.conn(foo, "10.244.1.5:41000", ep2)
	k.isn, k.ctid = 9000, 9
	k.vip().ipvs().new()
	l.pass(1 * ms)
	k.synack()
	for _, again := range []time.Duration{1000 * ms, 2000 * ms} {
		l.wait(again)
		k.syn()
	}
	l.wait(200 * ms)
	l.failedFor(trace.ReplyLost, "")
	if len(asked) != 1 {
		t.Fatalf("asked %+v", asked)
	}
	l.c.Explain(asked[0].Flow.ID, asked[0].Flow.Tuple, trace.NotForwarded, "ip_forward")
	l.failedFor(trace.NotForwarded, "ip_forward")
}

// TestElsewhereInIPVS shows an entry that another rule led elsewhere before IPVS.
func TestElsewhereInIPVS(t *testing.T) {
	var asked []correlate.Inquiry
	l := inIPVS(newLab(t, func(c *correlate.Config) { c.Inquire = func(i correlate.Inquiry) { asked = append(asked, i) } }), "rr")
	l.canAsk = true
	k := l.conn(foo, pod, ap("10.244.9.9:80")).vip().new()
	l.wait(1500 * ms)
	k.entry()
	l.failedFor(trace.SynUnanswered, "")
	if len(asked) != 1 || !asked[0].Elsewhere {
		t.Fatalf("asked %+v", asked)
	}
}

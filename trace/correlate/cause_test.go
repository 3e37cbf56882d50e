package correlate_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

// failedFor wants the only flow to have failed for a reason, and its cause to say so.
func (l *lab) failedFor(reason trace.Reason, says string) {
	l.t.Helper()
	f := l.only()
	if f.Reason != reason || !strings.Contains(f.Cause, says) {
		l.t.Errorf("got %s for %q (%s), want %q (%s)", f.Outcome, f.Reason, f.Cause, reason, says)
	}
}

// without is a generation in which an endpoint of foo is no more.
func (l *lab) without(ep netip.AddrPort, from time.Time) {
	eps := endpoints()
	var kept []netip.AddrPort
	for _, e := range eps[foo] {
		if e != ep {
			kept = append(kept, e)
		}
	}
	eps[foo] = kept
	l.views = append([]*proxy.View{view(from, &l.walks, eps)}, l.views...)
}

func TestCauseOfEndpoint(t *testing.T) {
	t.Run("it had left before", func(t *testing.T) {
		l := newLab(t, nil)
		l.without(ep1, time.Unix(0, l.now))
		l.pass(70 * time.Millisecond)
		l.conn(foo, pod, ep1).pick().new().rstIn()
		l.failedFor(trace.RulesBehind, "70ms before")
	})
	t.Run("it leaves meanwhile", func(t *testing.T) {
		l := newLab(t, nil)
		k := l.conn(foo, pod, ep1).pick().new()
		l.wait(500 * time.Millisecond)
		l.without(ep1, time.Unix(0, l.now))
		l.wait(700 * time.Millisecond)
		k.syn()
		l.failedFor(trace.EndpointGone, "500ms after the connection began")
	})
	t.Run("it terminates", func(t *testing.T) {
		l := newLab(t, nil)
		for i := range l.views[0].Snapshot.Services {
			for j := range l.views[0].Snapshot.Services[i].Endpoints {
				l.views[0].Snapshot.Services[i].Endpoints[j].Terminating = true
			}
		}
		l.conn(foo, pod, ep1).pick().new().rstIn()
		l.failedFor(trace.EndpointTerminating, "")
	})
	t.Run("affinity keeps the client there", func(t *testing.T) {
		l := newLab(t, nil)
		l.conn(sticky, pod, ep1).miss().pick().new().rstIn()
		l.failedFor(trace.EndpointRefused, "")
		l.flows = map[trace.FlowID]*trace.Flow{}
		l.wait(time.Second)
		k := l.conn(sticky, "10.244.1.5:41000", ep1)
		k.isn = 7000
		k.pick().new().rstIn()
		l.failedFor(trace.AffinityDead, "endpoint-refused")
	})
	t.Run("nothing but the refusal is known", func(t *testing.T) {
		l := newLab(t, nil)
		l.conn(foo, pod, ep1).pick().new().rstIn()
		l.failedFor(trace.EndpointRefused, "")
	})
	t.Run("a pod is sent to itself", func(t *testing.T) {
		l := newLab(t, nil)
		l.conn(foo, "10.244.1.2:4000", ep1).pick().new()
		l.wait(1200 * time.Millisecond)
		l.failedFor(trace.Hairpin, "")
	})
}

// TestCauseOfAnswers has those that were not seen, or got lost, looked for, and believes
// what was found only of such.
func TestCauseOfAnswers(t *testing.T) {
	lookedFor := func(t *testing.T, run func(l *lab, k *conn)) (*lab, *conn, []correlate.Inquiry) {
		var asked []correlate.Inquiry
		l := newLab(t, func(c *correlate.Config) { c.Inquire = func(i correlate.Inquiry) { asked = append(asked, i) } })
		k := l.conn(foo, pod, ep1)
		run(l, k)
		return l, k, asked
	}
	unanswered := func(l *lab, k *conn) { k.pick().new(); l.wait(1100 * ms); k.syn() }
	lost := func(l *lab, k *conn) {
		k.pick().new()
		e := k.event(trace.KindSynAck, k.reply())
		e.InDev = 9
		k.send(e)
		for range 3 {
			l.wait(time.Second)
			k.syn()
		}
	}
	t.Run("past the node", func(t *testing.T) {
		l, k, asked := lookedFor(t, unanswered)
		if len(asked) != 1 || asked[0].ISN != k.isn || asked[0].Flow.Reply != k.reply() {
			t.Fatalf("asked %+v", asked)
		}
		f := l.only()
		l.c.Explain(f.ID, f.Tuple, trace.ReplyBypassed, "its reset came in by eth0")
		l.failedFor(trace.ReplyBypassed, "eth0")
		l.wait(40 * time.Second)
		if f := l.only(); f.Outcome != trace.Timeout || f.Reason != trace.ReplyBypassed {
			t.Errorf("ends as %s for %s", f.Outcome, f.Reason)
		}
	})
	t.Run("past the node, and the next one is translated", func(t *testing.T) {
		l, k, _ := lookedFor(t, unanswered)
		f := l.only()
		l.c.Explain(f.ID, f.Tuple, trace.ReplyBypassed, "its reset came in by eth0")
		k.synack()
		if f := l.only(); f.Outcome != trace.Open || f.Reason != trace.NoReason {
			t.Errorf("%s for %s", f.Outcome, f.Reason)
		}
		k.rstOut()
		l.wait(time.Second)
		l.failedFor(trace.ResetByClient, "")
	})
	t.Run("seen after all", func(t *testing.T) {
		l, k, _ := lookedFor(t, unanswered)
		k.synack()
		f := l.only()
		l.c.Explain(f.ID, f.Tuple, trace.ReplyBypassed, "its reset came in by eth0")
		if f := l.only(); f.Outcome != trace.Open || f.Reason != trace.NoReason {
			t.Errorf("%s for %s", f.Outcome, f.Reason)
		}
	})
	t.Run("what was said of a drop is not of an answer", func(t *testing.T) {
		l, _, _ := lookedFor(t, unanswered)
		f := l.only()
		l.c.Explain(f.ID, f.Tuple, trace.DroppedByRule, "rule 1 of filter/FORWARD")
		l.failedFor(trace.SynUnanswered, "")
		l.c.Explain(f.ID, f.Tuple, trace.ReplyRPFilter, "it came by eth0")
		l.failedFor(trace.SynUnanswered, "")
	})
	t.Run("a masqueraded one is answered to the node", func(t *testing.T) {
		_, _, asked := lookedFor(t, func(l *lab, k *conn) { k.masq = true; unanswered(l, k) })
		if len(asked) != 0 {
			t.Errorf("asked %+v", asked)
		}
	})
	for name, tc := range map[string]struct {
		again   int
		with    func(*trace.Event)
		outcome trace.Outcome
		reason  trace.Reason
	}{
		"nobody acknowledged it":             {1, state(conntrack.TCPSynRecv), trace.Timeout, trace.ReplyLost},
		"nor did the client try again":       {0, state(conntrack.TCPSynRecv), trace.Unknown, trace.NoReason},
		"it was acknowledged after all":      {1, state(conntrack.TCPEstablished), trace.Closed, trace.IdleExpired},
		"somebody deleted the entry instead": {1, func(e *trace.Event) { early(e); state(conntrack.TCPSynRecv)(e) }, trace.Unknown, trace.NoReason},
	} {
		t.Run("the entry expired, "+name, func(t *testing.T) {
			l := newLab(t, nil)
			k := l.conn(foo, pod, ep1).pick().new().synack()
			for range tc.again {
				l.wait(time.Second)
				k.syn()
			}
			l.wait(10 * time.Second)
			k.destroy(tc.with)
			l.wait(time.Second)
			if f := l.only(); f.Outcome != tc.outcome || f.Reason != tc.reason {
				t.Errorf("%s for %q, want %s for %q", f.Outcome, f.Reason, tc.outcome, tc.reason)
			}
		})
	}
	t.Run("dropped by rp_filter", func(t *testing.T) {
		l, _, asked := lookedFor(t, lost)
		if len(asked) != 1 || asked[0].AnswerDevice != 9 || asked[0].Flow.Reason != trace.ReplyLost {
			t.Fatalf("asked %+v", asked)
		}
		f := l.only()
		l.c.Explain(f.ID, f.Tuple, trace.ReplyBypassed, "")
		l.failedFor(trace.ReplyLost, "")
		l.c.Explain(f.ID, f.Tuple, trace.ReplyRPFilter, "it came by eth0")
		l.failedFor(trace.ReplyRPFilter, "eth0")
		l.wait(40 * time.Second)
		l.failedFor(trace.ReplyRPFilter, "eth0")
	})
}

func TestCauseOnNode(t *testing.T) {
	var asked []*trace.Flow
	inquire := func(c *correlate.Config) { c.Inquire = func(i correlate.Inquiry) { asked = append(asked, i.Flow) } }
	t.Run("the packet never left", func(t *testing.T) {
		asked = nil
		l := newLab(t, inquire)
		k := l.conn(foo, pod, ep1).pick()
		l.wait(1100 * time.Millisecond)
		l.failedFor(trace.DroppedOnNode, "")
		if len(asked) != 1 {
			t.Fatalf("asked %d times", len(asked))
		}
		l.c.Explain(asked[0].ID, asked[0].Tuple, trace.DroppedByRule, "rule 1 of filter/FORWARD")
		l.failedFor(trace.DroppedByRule, "rule 1")
		k.syn()
		l.wait(40 * time.Second)
		l.failedFor(trace.DroppedByRule, "rule 1") // and stays so
		if len(asked) != 1 {
			t.Errorf("asked %d times", len(asked))
		}
	})
	t.Run("its entry was there after all", func(t *testing.T) {
		asked = nil
		l := newLab(t, inquire)
		k := l.conn(foo, pod, ep1).pick()
		l.wait(1100 * time.Millisecond)
		k.new()
		l.c.Explain(asked[0].ID, asked[0].Tuple, trace.DroppedByRule, "rule 1 of filter/FORWARD")
		k.syn()
		l.failedFor(trace.SynUnanswered, "")
	})
	t.Run("the entry's event may have been lost", func(t *testing.T) {
		asked = nil
		l := newLab(t, inquire)
		l.conn(foo, pod, ep1).pick()
		l.c.Lost(trace.Loss{Source: trace.Conntrack, Events: 1, From: l.now, To: l.now + int64(time.Second)})
		l.wait(1100 * time.Millisecond)
		if f := l.only(); f.Reason == trace.DroppedOnNode || slices.ContainsFunc(asked, func(f *trace.Flow) bool { return f.Reason != trace.SynUnanswered }) {
			t.Errorf("got %s", f.Reason)
		}
	})
	t.Run("the node itself refuses", func(t *testing.T) {
		asked = nil
		l := newLab(t, inquire)
		k := l.conn(foo, pod, ep1).pick()
		e := k.event(trace.KindRst, k.reply())
		e.TCPSeq, e.TCPAck, e.Hook = 0, k.isn+1, 3
		k.send(e)
		l.failedFor(trace.DroppedByRule, "")
		if len(asked) != 1 {
			t.Errorf("asked %d times", len(asked))
		}
	})
	t.Run("the answer is lost", func(t *testing.T) {
		l := newLab(t, nil)
		k := l.conn(foo, pod, ep1).pick().new().synack()
		l.wait(time.Second)
		k.syn() // might have crossed it
		if f := l.only(); f.Outcome != trace.Open {
			t.Errorf("after one more SYN: %s", f.Outcome)
		}
		l.wait(2 * time.Second)
		k.syn()
		l.wait(time.Second)
		l.failedFor(trace.ReplyLost, "")
		l.wait(40 * time.Second)
		l.failedFor(trace.ReplyLost, "")
	})
	t.Run("the entry is older than the rules", func(t *testing.T) {
		l := newLab(t, nil)
		k := l.conn(dns, pod, ap(vips[dns])) // answers would come from the Service itself
		k.new()
		l.wait(3 * time.Second)
		l.failedFor(trace.Untranslated, "")
	})
	t.Run("the entry expired", func(t *testing.T) {
		l := newLab(t, nil)
		k := l.conn(foo, pod, ep1).pick().new().synack()
		l.wait(time.Minute)
		k.destroy(answered, state(conntrack.TCPEstablished), packets(3, 2))
		l.wait(time.Second)
		if f := l.only(); f.Outcome != trace.Closed || f.Reason != trace.IdleExpired {
			t.Errorf("got %s %s", f.Outcome, f.Reason)
		}
	})
}

func TestCauseOfNoEndpoints(t *testing.T) {
	for name, c := range map[string]struct {
		edit func(*proxy.Service)
		want trace.Reason
	}{
		"none":          {func(*proxy.Service) {}, trace.NoEndpoints},
		"not ready":     {func(s *proxy.Service) { s.Endpoints = []proxy.Endpoint{{Addr: ep1}, {Addr: ep2}} }, trace.EndpointsNotReady},
		"of other name": {func(s *proxy.Service) { s.OtherPorts = []string{"web/TCP"} }, trace.PortMismatch},
		"ready by now":  {func(s *proxy.Service) { s.Endpoints = []proxy.Endpoint{{Addr: ep1, Ready: true}} }, trace.NoEndpoints},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, nil)
			for i := range l.views[0].Snapshot.Services {
				if s := &l.views[0].Snapshot.Services[i]; s.Name == empty {
					c.edit(s)
				}
			}
			l.conn(empty, pod, netip.AddrPort{}).refuse(trace.KindReject, "no-endpoints")
			l.failedFor(c.want, "")
		})
	}
}

// TestCauseOfEntries has entries go elsewhere, vanish and stay too long.
func TestCauseOfEntries(t *testing.T) {
	t.Run("another rule sent it elsewhere", func(t *testing.T) {
		var asked []correlate.Inquiry
		l := newLab(t, func(c *correlate.Config) {
			c.Inquire = func(i correlate.Inquiry) { asked = append(asked, i) }
			c.Ask = func(conntrack.Tuple) bool { return true }
		})
		k := l.conn(foo, pod, netip.MustParseAddrPort("10.244.9.9:80")).new()
		l.wait(1500 * time.Millisecond)
		k.entry() // no answer so far
		l.failedFor(trace.SynUnanswered, "")
		if len(asked) != 1 || !asked[0].Elsewhere {
			t.Fatalf("asked %+v", asked)
		}
		if f := l.only(); f.Service.Name != foo || f.Backend.Addr != k.ep {
			t.Errorf("shown as %+v at %v", f.Service, f.Backend.Addr)
		}
		l.c.Explain(asked[0].Flow.ID, asked[0].Flow.Tuple, trace.NodePortShadowed, "rule 1 of nat/PREROUTING")
		l.failedFor(trace.NodePortShadowed, "rule 1")
		l.wait(40 * time.Second)
		l.failedFor(trace.NodePortShadowed, "rule 1")
	})
	t.Run("what was sent later was picked for anew", func(t *testing.T) {
		l := newLab(t, nil)
		k := l.conn(foo, pod, ep1)
		e := k.event(trace.KindPick, k.orig())
		e.Rule = &proxy.Rule{Service: foo, Endpoint: ep1}
		e.TCPFlags = 0x18 // PSH, ACK
		k.send(e)
		k.new().rstIn()
		l.failedFor(trace.EntryLost, "new connection")
	})
	t.Run("of that only the entry was seen", func(t *testing.T) {
		l := newLab(t, nil)
		k := l.conn(foo, pod, ep1)
		e := k.ct(trace.KindNew)
		e.TCPState = conntrack.TCPEstablished
		k.send(e)
		l.wait(200 * time.Millisecond)
		k.rstIn()
		l.failedFor(trace.EntryLost, "new connection")
	})
	t.Run("its entry is looked at as soon as the endpoint left", func(t *testing.T) {
		l := newLab(t, nil)
		l.canAsk = true
		k := l.conn(dns, pod, dnsEndpoint(t)).pick().new().answer()
		other := l.conn(dns, "10.244.1.5:40001", netip.MustParseAddrPort("10.244.9.9:5353"))
		l.wait(time.Second)
		eps := endpoints()
		eps[dns] = []netip.AddrPort{netip.MustParseAddrPort("10.244.9.9:5353")}
		l.views = append([]*proxy.View{view(time.Unix(0, l.now), &l.walks, eps)}, l.views...)
		other.pick().new().answer() // began at one that is there
		for n := uint64(5); n < 7; n++ {
			l.asked = nil
			l.wait(1200 * time.Millisecond)
			if len(l.asked) != 1 || l.asked[0] != k.orig() {
				t.Fatalf("looked at %v", l.asked)
			}
			k.entry(answered, packets(n, 5), func(e *trace.Event) { e.Timeout = 120 })
		}
		for _, f := range l.flows {
			if want := f.Tuple == k.orig(); (f.Reason == trace.StaleEntry) != want || f.Outcome.Failed() != want {
				t.Errorf("%v: %s for %q", f.Tuple, f.Outcome, f.Reason)
			}
		}
		l.asked = nil
		if l.wait(5 * time.Second); len(l.asked) != 0 {
			t.Errorf("what is known is looked at as often: %v", l.asked)
		}
	})
	t.Run("a UDP client stays at an endpoint that left", func(t *testing.T) {
		l := newLab(t, func(c *correlate.Config) { c.Ask = func(conntrack.Tuple) bool { return true } })
		k := l.conn(dns, pod, dnsEndpoint(t)).pick().new().answer()
		k.entry(answered, packets(5, 5))
		if f := l.only(); f.Outcome != trace.Open {
			t.Fatalf("got %s", f.Outcome)
		}
		eps := endpoints()
		eps[dns] = []netip.AddrPort{netip.MustParseAddrPort("10.244.9.9:5353")}
		l.views = append([]*proxy.View{view(time.Unix(0, l.now), &l.walks, eps)}, l.views...)
		k.entry(answered, packets(6, 6)) // the last answer
		if f := l.only(); f.Outcome != trace.Open {
			t.Fatalf("an answer came: %s %s", f.Outcome, f.Reason)
		}
		l.wait(time.Second)
		k.entry(answered, packets(9, 6))
		l.failedFor(trace.StaleEntry, "3 datagrams")
	})
}

// dnsEndpoint is the endpoint of dns.
func dnsEndpoint(t *testing.T) netip.AddrPort {
	eps := endpoints()[dns]
	if len(eps) == 0 {
		t.Fatal("dns has no endpoint")
	}
	return eps[0]
}

// TestCauseTooLarge says so only of senders that do not heed the first word.
func TestCauseTooLarge(t *testing.T) {
	tooBig := func(k *conn, quoted conntrack.Tuple) {
		e := k.event(trace.KindICMP, quoted)
		e.ICMPType, e.ICMPCode, e.ICMPMTU = 3, 4, 1000
		e.ICMPFrom = netip.MustParseAddr("10.0.0.1").As16()
		k.send(e)
	}
	for name, quoted := range map[string]func(*conn) conntrack.Tuple{
		"requests":                 func(k *conn) conntrack.Tuple { return k.reply().Reverse() },
		"answers":                  func(k *conn) conntrack.Tuple { return k.reply() },
		"answers behind this node": func(k *conn) conntrack.Tuple { return k.orig().Reverse() },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, nil)
			k := l.conn(foo, pod, ep1).pick().new().synack()
			tooBig(k, quoted(k))
			l.pass(time.Millisecond)
			tooBig(k, quoted(k)) // more that were on their way
			if f := l.only(); f.Reason != trace.NoReason {
				t.Errorf("at the first word: %s", f.Reason)
			}
			l.wait(250 * time.Millisecond)
			tooBig(k, quoted(k))
			l.failedFor(trace.TooLarge, "MTU of 1000, says 10.0.0.1")
			l.wait(time.Second)
			k.rstOut()
			l.wait(time.Second)
			l.failedFor(trace.TooLarge, "MTU of 1000")
		})
	}
}

// TestRefusalBeside takes a refusal by live rules of another for granted only where
// the state agrees: the rules may have changed since they were read.
func TestRefusalBeside(t *testing.T) {
	for name, c := range map[string]struct {
		endpoints []proxy.Endpoint
		want      trace.Reason
		asked     int
	}{
		"the state has none either": {nil, trace.NoEndpoints, 0},
		"the state has one":         {[]proxy.Endpoint{{Addr: ep1, Ready: true}}, trace.DroppedOnNode, 1},
	} {
		t.Run(name, func(t *testing.T) {
			asked := 0
			l := newLab(t, func(c *correlate.Config) { c.Inquire = func(correlate.Inquiry) { asked++ } })
			for i := range l.views[0].Snapshot.Services {
				if s := &l.views[0].Snapshot.Services[i]; s.Name == empty {
					s.Endpoints = c.endpoints
				}
			}
			l.conn(empty, pod, ep1).vip()
			l.wait(1500 * time.Millisecond)
			if f := l.only(); f.Outcome != trace.Rejected || f.Reason != c.want || asked != c.asked {
				t.Errorf("got %s for %s, asked %d times", f.Outcome, f.Reason, asked)
			}
		})
	}
}

// TestOldSocket has the endpoint answer a SYN with what it remembers of an older
// connection from the same port: the client resets that, and its next SYN is good.
func TestOldSocket(t *testing.T) {
	l := newLab(t, nil)
	k := l.conn(foo, pod, ep1).pick().new()
	e := k.event(trace.KindRst, k.orig())
	e.TCPSeq = k.isn + 5000
	k.send(e)
	l.wait(900 * time.Millisecond)
	if f := l.only(); f.Ended || f.Outcome.Failed() {
		t.Fatalf("after the reset: %s %s", f.Outcome, f.Reason)
	}
	k.destroy(early, state(conntrack.TCPClose))
	k.pick().new().synack()
	l.wait(100 * time.Millisecond)
	if f := l.only(); f.Outcome != trace.Open || f.Reason != trace.NoReason {
		t.Errorf("got %s for %q", f.Outcome, f.Reason)
	}
}

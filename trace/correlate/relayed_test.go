package correlate_test

import (
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

// relayed has the userspace proxy tell of a connection, and a millisecond pass.
func (k *conn) relayed(kind trace.EventKind, r trace.Relayed) *conn {
	r.ID, r.Affinity = 5, trace.AffinityNone
	e := k.event(kind, k.orig())
	e.Source, e.TCPSeq, e.Relayed = trace.Userspace, 5, &r
	e.Reply = conntrack.NewTuple(k.service.Proto, ap("10.1.0.1:30000"), k.src)
	e.Rule = &proxy.Rule{Service: k.service, Endpoint: k.ep}
	k.send(e)
	k.l.pass(time.Millisecond)
	return k
}

func (k *conn) dial() *conn { return k.relayed(trace.KindPick, trace.Relayed{}) }
func (k *conn) fail(why proxy.RelayFailure) *conn {
	return k.relayed(trace.KindTryFailed, trace.Relayed{Failure: why})
}
func (k *conn) reached() *conn {
	return k.relayed(trace.KindConnected, trace.Relayed{Upstream: ap("10.1.0.1:51000")})
}
func (k *conn) over(end proxy.RelayEnd) *conn {
	return k.relayed(trace.KindRelayEnd, trace.Relayed{End: end})
}

// userspaceLab has the inquiries of a correlator in userspace mode.
func userspaceLab(t *testing.T) (*lab, *[]correlate.Inquiry) {
	asked := &[]correlate.Inquiry{}
	l := newLab(t, func(c *correlate.Config) {
		c.Inquire = func(i correlate.Inquiry) { *asked = append(*asked, i) }
		c.Watched = func() bool { return !strings.Contains(t.Name(), "unwatched") }
	})
	l.views[0].Mode = proxy.Userspace
	return l, asked
}

// wantTries wants the tries of the only flow to have failed for reasons.
func (l *lab) wantTries(reasons ...trace.Reason) *trace.Flow {
	l.t.Helper()
	f := l.only()
	if len(f.Attempts) != len(reasons) {
		l.t.Fatalf("tries %+v, want %q", f.Attempts, reasons)
	}
	for i, want := range reasons {
		if got := f.Attempts[i].Reason; got != want {
			l.t.Errorf("try %d failed for %q (%s), want %q", i+1, got, f.Attempts[i].Cause, want)
		}
	}
	return f
}

// TestCauseOfTries gives each try of the userspace proxy its own reason, and the
// connection that of the last one.
func TestCauseOfTries(t *testing.T) {
	t.Run("each by what its dial said", func(t *testing.T) {
		l, asked := userspaceLab(t)
		k := l.conn(foo, pod, ep1).dial().fail(proxy.FailedRefused)
		k.ep = ep2
		k.dial().fail(proxy.FailedTimeout)
		k.ep = ep1
		k.dial().fail(proxy.FailedUnreachable).over(proxy.EndedUnanswered)
		l.wantTries(trace.EndpointRefused, trace.SynUnanswered, trace.Unreachable)
		l.failedFor(trace.Unreachable, "")
		if f := l.only(); f.Outcome != trace.Refused || !f.Ended {
			t.Errorf("it is %s, ended: %v", f.Outcome, f.Ended)
		}
		for i, in := range *asked {
			if in.Try != i+1 || len(in.Flow.Attempts) != i+1 {
				t.Errorf("asked about try %d of %d as number %d", in.Try, len(in.Flow.Attempts), i+1)
			}
		}
		if len(*asked) != 3 {
			t.Errorf("asked %d times", len(*asked))
		}
	})
	t.Run("a connection that was served did not fail", func(t *testing.T) {
		l, _ := userspaceLab(t)
		k := l.conn(foo, pod, ep1).dial().fail(proxy.FailedRefused)
		k.ep = ep2
		k.dial().reached().over(proxy.EndedByClient)
		l.wait(time.Second)
		if f := l.wantTries(trace.EndpointRefused, trace.NoReason); f.Outcome != trace.Closed || f.Reason != trace.NoReason {
			t.Errorf("it is %s for %q", f.Outcome, f.Reason)
		}
	})
	t.Run("the state comes first", func(t *testing.T) {
		l, asked := userspaceLab(t)
		l.without(ep1, time.Unix(0, l.now))
		l.views[0].Mode = proxy.Userspace
		l.pass(70 * time.Millisecond)
		k := l.conn(foo, pod, ep1).dial().fail(proxy.FailedTimeout)
		l.wantTries(trace.RulesBehind)
		k.over(proxy.EndedUnanswered)
		l.failedFor(trace.RulesBehind, "70ms before")
		if len(*asked) != 0 {
			t.Errorf("asked %+v", *asked)
		}
	})
	t.Run("one that was reset by an endpoint that has left", func(t *testing.T) {
		l, _ := userspaceLab(t)
		k := l.conn(foo, pod, ep1).dial().reached()
		l.wait(100 * time.Millisecond)
		l.without(ep1, time.Unix(0, l.now))
		k.over(proxy.EndedResetEndpoint)
		l.wait(time.Second)
		l.failedFor(trace.EndpointGone, "after the connection began")
	})
	t.Run("the client gave up and the proxy ended by themselves", func(t *testing.T) {
		for end, want := range map[proxy.RelayEnd]trace.Reason{
			proxy.EndedResetClient: trace.ResetByClient, proxy.EndedShutdown: trace.ProxyStopped, proxy.EndedNoEndpoints: trace.NoEndpoints,
		} {
			l, _ := userspaceLab(t)
			l.conn(foo, pod, ep1).dial().fail(proxy.FailedRefused).over(end)
			l.wait(time.Second)
			l.failedFor(want, "")
			l.wantTries(trace.EndpointRefused)
		}
	})
}

// TestExplainTry makes reasons of tries more exact, while the connection lasts and
// for a moment after.
func TestExplainTry(t *testing.T) {
	explain := func(l *lab, in correlate.Inquiry, reason trace.Reason, cause string) {
		l.c.ExplainTry(in.Flow.ID, in.Flow.Tuple, in.Try, reason, cause)
	}
	t.Run("of a connection that goes on", func(t *testing.T) {
		l, asked := userspaceLab(t)
		k := l.conn(foo, pod, ep1).dial().fail(proxy.FailedTimeout)
		k.ep = ep2
		k.dial()
		explain(l, (*asked)[0], trace.DroppedByRule, "rule 1")
		if f := l.wantTries(trace.DroppedByRule, trace.NoReason); f.Attempts[0].Cause != "rule 1" || f.Reason != trace.NoReason {
			t.Errorf("cause %q, and the connection has %q", f.Attempts[0].Cause, f.Reason)
		}
		k.fail(proxy.FailedRefused).over(proxy.EndedUnanswered)
		l.wantTries(trace.DroppedByRule, trace.EndpointRefused)
		l.failedFor(trace.EndpointRefused, "")
	})
	t.Run("unwatched, what was asked about does not change", func(t *testing.T) {
		l, asked := userspaceLab(t)
		l.conn(foo, pod, ep1).dial().fail(proxy.FailedTimeout).dial().reached()
		explain(l, (*asked)[0], trace.DroppedByRule, "rule 1")
		if f := (*asked)[0].Flow; len(f.Attempts) != 1 || f.Attempts[0].Reason != trace.SynUnanswered || f.Outcome == trace.Open {
			t.Errorf("it is %s now, tries %+v", f.Outcome, f.Attempts)
		}
		l.wantTries(trace.DroppedByRule, trace.NoReason)
	})
	t.Run("of one that has failed", func(t *testing.T) {
		l, asked := userspaceLab(t)
		l.conn(foo, pod, ep1).dial().fail(proxy.FailedTimeout).over(proxy.EndedUnanswered)
		l.failedFor(trace.SynUnanswered, "")
		explain(l, (*asked)[0], trace.NoRoute, "")
		l.wantTries(trace.NoRoute)
		l.failedFor(trace.NoRoute, "")
		explain(l, (*asked)[0], trace.NoReason, "not evaluated")
		l.failedFor(trace.NoRoute, "not evaluated")
	})
	t.Run("of datagrams, whose session is over at once", func(t *testing.T) {
		l, asked := userspaceLab(t)
		l.conn(dns, pod, ep1).dial().fail(proxy.FailedRefused).over(proxy.EndedRefused)
		l.wait(2 * time.Second)
		explain(l, (*asked)[0], trace.DroppedByRule, "rule 2")
		l.failedFor(trace.DroppedByRule, "rule 2")
		l.wait(10 * time.Second)
		explain(l, (*asked)[0], trace.NoRoute, "too late")
		l.failedFor(trace.DroppedByRule, "rule 2")
	})
	t.Run("of none that did not fail", func(t *testing.T) {
		l, asked := userspaceLab(t)
		l.conn(foo, pod, ep1).dial().fail(proxy.FailedTimeout).dial().reached()
		n := len(l.updates)
		in := (*asked)[0]
		for _, try := range []int{0, 2, 3} {
			in.Try = try
			explain(l, in, trace.NoRoute, "")
		}
		l.wantTries(trace.SynUnanswered, trace.NoReason)
		if len(l.updates) != n {
			t.Errorf("%d updates of nothing", len(l.updates)-n)
		}
	})
}

// TestEntriesBesideRelay shows entries that do not lead to the userspace proxy.
func TestEntriesBesideRelay(t *testing.T) {
	t.Run("to the proxy itself", func(t *testing.T) {
		l, asked := userspaceLab(t)
		l.conn(foo, pod, ap("10.1.0.1:30000")).new()
		l.wait(1500 * time.Millisecond)
		for _, f := range l.flows {
			if f.Outcome.Failed() || f.Decision.Note == "sent to what is no endpoint" {
				t.Errorf("shown as %s, %q", f.Outcome, f.Decision.Note)
			}
		}
		if len(*asked) != 0 {
			t.Errorf("asked %+v", *asked)
		}
	})
	t.Run("elsewhere", func(t *testing.T) {
		l, asked := userspaceLab(t)
		l.canAsk = true
		k := l.conn(foo, pod, ap("10.244.9.9:80")).new()
		l.wait(1500 * time.Millisecond)
		k.entry()
		l.failedFor(trace.SynUnanswered, "")
		if len(*asked) != 1 || !(*asked)[0].Elsewhere || (*asked)[0].Try != 0 {
			t.Fatalf("asked %+v", *asked)
		}
	})
	t.Run("untranslated", func(t *testing.T) {
		l, _ := userspaceLab(t)
		l.conn(foo, pod, ap(vips[foo])).new()
		l.wait(1500 * time.Millisecond)
		l.failedFor(trace.Untranslated, "")
	})
}

package correlate_test

import (
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

// TestInvalidDropped: a segment that is INVALID when it is sent again, too, and that a
// rule drops is the reason; nothing less is.
func TestInvalidDropped(t *testing.T) {
	const rule = "rule 1 of filter/KUBE-FORWARD: -m conntrack --ctstate INVALID -j DROP"
	k1 := func(l *lab) *conn { return l.conn(foo, pod, ep2).pick().new().synack() }
	segment := func(k *conn, tuple conntrack.Tuple, seq uint32, hook uint8) {
		e := k.event(trace.KindInvalid, tuple)
		e.TCPSeq, e.TCPFlags, e.Hook = seq, 16, hook
		k.send(e)
	}
	const forward, output = 2, 3
	for _, c := range []struct {
		name  string
		run   func(l *lab) *conn
		cause string
	}{
		{"sent again", func(l *lab) *conn {
			k := k1(l)
			l.wait(time.Second)
			segment(k, k.orig(), 5000, forward)
			l.wait(200 * ms)
			segment(k, k.orig(), 5000, forward)
			return k
		}, rule},
		{"of the endpoint", func(l *lab) *conn {
			k := k1(l)
			segment(k, k.reply(), 7000, forward)
			l.wait(200 * ms)
			segment(k, k.reply(), 7000, forward)
			return k
		}, rule},
		{"the entry was removed", func(l *lab) *conn {
			k := k1(l)
			l.wait(time.Second)
			k.destroy(answered, early, state(conntrack.TCPEstablished))
			l.wait(time.Second)
			segment(k, k.orig(), 5000, forward)
			l.wait(200 * ms)
			segment(k, k.orig(), 5000, forward)
			return k
		}, "its entry had been removed; " + rule},
		{"once", func(l *lab) *conn {
			k := k1(l)
			segment(k, k.orig(), 5000, forward)
			l.wait(time.Second)
			segment(k, k.orig(), 5100, forward)
			return k
		}, ""},
		{"a burst", func(l *lab) *conn {
			k := k1(l)
			segment(k, k.orig(), 5000, forward)
			l.pass(ms)
			segment(k, k.orig(), 5000, forward)
			return k
		}, ""},
		{"to the node itself", func(l *lab) *conn {
			k := k1(l)
			segment(k, k.orig(), 5000, output)
			l.wait(200 * ms)
			segment(k, k.orig(), 5000, output)
			return k
		}, ""},
		{"after its end", func(l *lab) *conn {
			k := k1(l)
			k.finOut().finIn()
			for range 2 {
				l.wait(200 * ms)
				segment(k, k.orig(), 5000, forward)
			}
			return k
		}, ""},
		{"expired", func(l *lab) *conn {
			k := k1(l)
			l.wait(time.Second)
			k.destroy(answered, state(conntrack.TCPEstablished))
			for range 3 {
				l.wait(200 * ms)
				segment(k, k.orig(), 5000, forward)
			}
			return k
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var asked []correlate.Inquiry
			l := newLab(t, func(c *correlate.Config) { c.Inquire = func(i correlate.Inquiry) { asked = append(asked, i) } })
			k := c.run(l)
			if (len(asked) == 1 && asked[0].Invalid.Proto() == conntrack.TCP) != (c.cause != "") {
				t.Fatalf("asked: %+v", asked)
			}
			// Whoever was not asked says nothing that would be believed.
			was := l.only()
			l.c.Explain(was.ID, k.orig(), trace.InvalidDropped, rule)
			f := l.only()
			if c.cause == "" {
				if f.Reason != was.Reason || f.Cause != was.Cause {
					t.Errorf("reason %s, %s", f.Reason, f.Cause)
				}
				return
			}
			if f.Reason != trace.InvalidDropped || f.Cause != c.cause || f.Outcome != was.Outcome {
				t.Errorf("%s %s, %s", f.Outcome, f.Reason, f.Cause)
			}
			if f.Ended {
				return
			}
			k.rstOut()
			l.wait(time.Second)
			if f := l.only(); f.Outcome != trace.Reset || f.Reason != trace.InvalidDropped || f.Cause != c.cause {
				t.Errorf("when it has ended: %s %s, %s", f.Outcome, f.Reason, f.Cause)
			}
		})
	}
	t.Run("no rule drops them", func(t *testing.T) {
		l := newLab(t, func(c *correlate.Config) { c.Inquire = func(correlate.Inquiry) {} })
		k := k1(l)
		segment(k, k.orig(), 5000, forward)
		l.wait(200 * ms)
		segment(k, k.orig(), 5000, forward)
		k.rstIn()
		l.wait(time.Second)
		if f := l.only(); f.Reason != trace.ResetByEndpoint {
			t.Errorf("%s %s", f.Outcome, f.Reason)
		}
	})
}

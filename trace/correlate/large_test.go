package correlate_test

import (
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// TestLargeUnacknowledged says so only where all of it was seen: large packets that
// passed long before the end, more of them since, and no word from the other side but
// its FIN or RST, which acknowledges none of them.
func TestLargeUnacknowledged(t *testing.T) {
	const seen = uint32(5000) // the endpoint's first number
	counters := func(out, outBytes, in, inBytes uint64) func(*trace.Event) {
		return func(e *trace.Event) {
			e.Out, e.In = conntrack.Counters{Packets: out, Bytes: outBytes}, conntrack.Counters{Packets: in, Bytes: inBytes}
		}
	}
	look := counters(3, 260, 9, 10*1500-2000)
	for _, tt := range []struct {
		name        string
		look, final func(*trace.Event)
		end         trace.EventKind
		byEndpoint  bool
		acked       uint32 // beyond the SYN
		flags       byte
		wait        time.Duration // between the look and the end
		reason      trace.Reason
	}{
		{name: "the client hears nothing and goes", look: look, final: counters(4, 312, 12, 17500),
			end: trace.KindFin, flags: 17, wait: 3 * time.Second, reason: trace.LargeUnacknowledged},
		{name: "it resets", look: look, final: counters(4, 312, 12, 17500),
			end: trace.KindRst, flags: 20, wait: 3 * time.Second, reason: trace.LargeUnacknowledged},
		{name: "a reset that acknowledges nothing proves nothing", look: look, final: counters(4, 312, 12, 17500),
			end: trace.KindRst, flags: 4, wait: 3 * time.Second, reason: trace.ResetByClient},
		{name: "an upload", look: counters(12, 16000, 2, 112), final: counters(15, 20500, 3, 164),
			end: trace.KindFin, byEndpoint: true, flags: 17, wait: 3 * time.Second, reason: trace.LargeUnacknowledged},
		{name: "it has it all", look: look, final: counters(4, 312, 12, 17500), acked: 12000,
			end: trace.KindFin, flags: 17, wait: 3 * time.Second},
		{name: "it acknowledged between", look: look, final: counters(9, 580, 12, 17500),
			end: trace.KindFin, flags: 17, wait: 3 * time.Second},
		{name: "nothing was sent again", look: look, final: counters(4, 312, 9, 13000),
			end: trace.KindFin, flags: 17, wait: 3 * time.Second},
		{name: "small packets", look: look, final: counters(4, 312, 40, 13000+31*60),
			end: trace.KindFin, flags: 17, wait: 3 * time.Second},
		{name: "small packets only", look: counters(3, 260, 4, 400), final: counters(4, 312, 12, 1200),
			end: trace.KindFin, flags: 17, wait: 3 * time.Second},
		{name: "a download that the client breaks off", look: counters(40, 2200, 900, 1300000), final: counters(41, 2252, 910, 1315000), acked: 1246000,
			end: trace.KindFin, flags: 17, wait: 3 * time.Second},
		{name: "too soon to tell", look: look, final: counters(4, 312, 12, 17500),
			end: trace.KindFin, flags: 17, wait: 900 * time.Millisecond},
		{name: "a late answer, taken at once", look: counters(3, 260, 2, 112), final: counters(4, 312, 4, 3112), acked: 2896,
			end: trace.KindFin, flags: 17, wait: 3 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, nil)
			l.canAsk = true
			k := l.conn(foo, pod, ep2)
			k.pick().new()
			l.pass(ms)
			e := k.event(trace.KindSynAck, k.reply())
			e.TCPSeq, e.TCPAck = seen, k.isn+1
			k.send(e)
			l.wait(time.Second)
			if len(l.asked) != 1 {
				t.Fatalf("looked at %d times", len(l.asked))
			}
			k.entry(answered, tt.look, state(conntrack.TCPEstablished))
			l.wait(tt.wait)
			e = k.event(tt.end, k.orig())
			e.TCPSeq, e.TCPAck, e.TCPFlags = k.isn+200, seen+1+tt.acked, tt.flags
			if tt.byEndpoint {
				e.Tuple, e.TCPSeq, e.TCPAck = k.reply(), seen+1, k.isn+1+tt.acked
			}
			k.send(e)
			l.wait(100 * ms)
			k.entry(answered, tt.final, state(conntrack.TCPFinWait))
			l.wait(time.Second)
			f := l.only()
			if !f.Ended || f.Reason != tt.reason || (f.Cause != "") != (tt.reason == trace.LargeUnacknowledged) {
				t.Errorf("%s for %q (%s), want %q", f.Outcome, f.Reason, f.Cause, tt.reason)
			}
		})
	}
}

package correlate_test

import (
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
)

// counted tells of counters that grew in the last 100 ms.
func (l *lab) counted(x correlate.Counted) {
	x.From, x.To = l.now-int64(100*ms), l.now
	l.c.Counted(x)
}

// TestConntrackFull says that the table was full only of first packets for a Service
// that nothing else tells of, that came while packets were dropped for it.
func TestConntrackFull(t *testing.T) {
	full := correlate.Counted{Drop: 3, Entries: 1000, Limit: 1000}
	type witnessed struct {
		counted correlate.Counted
		then    func(*lab, *conn)
		want    trace.Reason
	}
	for name, c := range map[string]witnessed{
		"dropped":                     {counted: full, want: trace.ConntrackFull},
		"nothing dropped":             {counted: correlate.Counted{Entries: 1000, Limit: 1000}},
		"dropped, and there was room": {counted: correlate.Counted{Drop: 3, Entries: 900, Limit: 1000}},
		"picked":                      {counted: full, then: func(_ *lab, k *conn) { k.pick().new().synack() }},
		"an entry alone":              {counted: full, then: func(_ *lab, k *conn) { k.new() }},
		"refused":                     {counted: full, then: func(_ *lab, k *conn) { k.refuse(trace.KindReject, "no-endpoints") }, want: trace.NoEndpoints},
		"reports were lost": {counted: full, then: func(l *lab, _ *conn) {
			l.c.Lost(trace.Loss{Source: trace.NFLog, From: l.now - int64(time.Second), To: l.now})
		}},
		"another second, another drop": {then: func(l *lab, _ *conn) { l.wait(500 * ms); l.counted(full) }},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, nil)
			k := l.conn(foo, pod, ep1)
			l.c.Witnessed(k.orig(), k.isn, l.now)
			l.pass(10 * ms)
			l.counted(c.counted)
			if c.then != nil {
				c.then(l, k)
			}
			l.wait(3 * time.Second)
			var got trace.Reason
			for _, f := range l.flows {
				if got = f.Reason; f.Reason == trace.ConntrackFull &&
					(f.Outcome != trace.Dropped || f.Service.Name != foo || f.Cause == "" || !f.Evidence.Has(trace.Wire) || !f.Ended) {
					t.Errorf("got %+v", f)
				}
			}
			if got != c.want {
				t.Errorf("reason %q, want %q", got, c.want)
			}
		})
	}

	l := newLab(t, nil)
	l.c.Witnessed(conntrack.NewTuple(conntrack.TCP, ap(pod), ap("10.9.9.9:80")), 1, l.now)
	l.counted(full)
	l.wait(2 * time.Second)
	if len(l.flows) != 0 {
		t.Errorf("a packet for no Service: %d flows", len(l.flows))
	}

	// A SYN sent again is no other connection; one that gets through is shown.
	l = newLab(t, nil)
	k := l.conn(foo, pod, ep1)
	for range 2 {
		l.c.Witnessed(k.orig(), k.isn, l.now)
		l.counted(full)
		l.wait(1500 * ms)
	}
	if f := l.only(); f.Reason != trace.ConntrackFull {
		t.Errorf("got %q", f.Reason)
	}
	k.pick().new().synack()
	l.wait(time.Second)
	open := 0
	for _, f := range l.flows {
		if f.Outcome == trace.Open && f.Reason == trace.NoReason {
			open++
		}
	}
	if len(l.flows) != 2 || open != 1 {
		t.Errorf("%d flows, %d open", len(l.flows), open)
	}
}

package node

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/exporters/prom"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/source/nflog"
)

// requestQueue bounds the requests that wait for the correlator.
const requestQueue = 1024

// requestBytes is how much of a packet with a request is read: what the rules
// copy.
const requestBytes = 1600

// request is a request that named a span.
type request struct {
	tuple conntrack.Tuple
	trace.Carried
}

// requests reads the headers that rules of the mode report, if
// Config.RequestGroup says so: few, and looked at one by one.
type requests struct {
	queue chan request
	// seen counts packets, unread those without a header that could be read,
	// dropped requests that found no room, missed reports the kernel could not
	// deliver.
	seen, unread, dropped, missed atomic.Uint64
}

// readRequests taps the group until ctx ends. What goes wrong is said and tried
// again; nothing else depends on it.
func (n *node) readRequests(ctx context.Context) {
	q := &n.tracer.requests
	for {
		var next uint32
		first := true
		err := guard(func() error {
			return nflog.Tap(ctx, nflog.TapConfig{Group: n.cfg.RequestGroup, CopyRange: requestBytes}, func() {}, func(p nflog.TapPacket) {
				if !first && p.Seq > next {
					q.missed.Add(uint64(p.Seq - next))
				}
				first, next = false, p.Seq+1
				q.take(&p, time.Now())
			})
		})()
		if ctx.Err() != nil {
			return
		}
		n.cfg.Logger.Error("requests are not read; connections are traced on their own; trying again", "in", relayAgain, "err", err)
		pause(ctx, relayAgain)
	}
}

// take reads one packet and keeps of it the header's ids, nothing else.
func (q *requests) take(p *nflog.TapPacket, now time.Time) {
	q.seen.Add(1)
	tuple, span, ok := nflog.ParseRequest(p.Payload)
	if !ok {
		q.unread.Add(1)
		return
	}
	at := p.Time
	if at.IsZero() {
		at = now
	}
	select {
	case q.queue <- request{tuple, trace.Carried{Time: at.UTC(), SpanContext: span}}:
	default:
		q.dropped.Add(1)
	}
}

// requestCounters are what became of the requests, for metrics.
func (n *node) requestCounters() []prom.Counter {
	if n.cfg.RequestGroup == 0 || n.tracer == nil {
		return nil
	}
	q := &n.tracer.requests
	var linked, late uint64
	if live := n.tracer.live.Load(); live != nil {
		s := live.stats()
		linked, late = s.Carried, s.CarriedLate
	}
	var list []prom.Counter
	help := "Requests with a traceparent header, by what became of them: linked to their connection, late (their connection was not known), unreadable (no header in the part of the head that was seen), dropped (the queue was full), missed (the kernel had no room)."
	for _, o := range []struct {
		outcome string
		n       uint64
	}{{"linked", linked}, {"late", late}, {"unreadable", q.unread.Load()}, {"dropped", q.dropped.Load()}, {"missed", q.missed.Load()}} {
		list = append(list, prom.Counter{
			Name: "kptrace_traceparent_requests_total", Help: help, Labels: []string{"outcome", o.outcome}, Value: float64(o.n),
		})
		help = ""
	}
	return list
}

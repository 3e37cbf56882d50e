package prom

import (
	"context"
	"sync"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

const (
	// drainEvery is how often updates are taken from the ring. Between two
	// times nobody waits for the ring, so its writer wakes nobody up.
	drainEvery = 100 * time.Millisecond
	// lookEvery is how often series of endpoints that are gone are looked for.
	lookEvery = 10 * time.Second
	// keepEnded bounds the connections remembered after their end, for their
	// final byte counts. It is more than the correlator keeps itself.
	keepEnded = 1<<16 + 1<<12
	// endedKept is how long, a little longer than the correlator does.
	endedKept = 6 * time.Minute
)

// flows turns Flows into the values of series.
type flows struct {
	cfg      FlowConfig
	find     func(trace.FlowID) (*trace.Flow, bool)
	exemplar func(*trace.Flow) bool

	mu     sync.Mutex // guards all below
	reader *trace.Reader
	now    int64

	services  map[proxy.PortName]*service
	list      []*service // in the order of names
	endpoints int
	view      *proxy.View
	fresh     bool // there are endpoints that the View was not asked about
	looked    time.Time
	clients   clients

	conns map[trace.FlowID]*conn
	spare *conn
	// ended lists connections that ended, oldest first.
	endedFirst, endedLast *conn
	endedCount            int

	// What this costs and cannot do.
	updates, lost, folded, dropped, scrapes uint64
	took, scraping                          time.Duration
	series                                  int
	directions                              [2]*dto.LabelPair
}

// conn is what is already counted of one connection.
type conn struct {
	id       trace.FlowID
	endpoint *endpoint
	revision uint32
	attempts int
	// retransmits counts the SYNs sent again in all attempts.
	retransmits int
	out, in     conntrack.Counters
	counted     bool
	open        bool
	established bool
	unanswered  bool
	ended       bool
	endedAt     int64
	next        *conn
}

func newFlows(cfg Config) *flows {
	cfg.Flows.setDefaults()
	f := &flows{
		cfg: cfg.Flows, find: cfg.Find, exemplar: cfg.Exemplar,
		services: map[proxy.PortName]*service{}, conns: map[trace.FlowID]*conn{},
		directions: [2]*dto.LabelPair{pair("direction", "out"), pair("direction", "in")},
		clients:    clients{max: cfg.Flows.Clients, allow: cfg.Flows.ClientAllow, all: map[clientName]*client{}},
	}
	return f
}

// Run counts what r brings until ctx ends, which is no error. It takes updates
// in batches and never makes the ring's writer wait or wake it; a scrape takes
// what has come until then.
func (e *Exporter) Run(ctx context.Context, r *trace.Reader) error {
	f := e.flows
	f.mu.Lock()
	f.reader = r
	f.mu.Unlock()
	tick := time.NewTicker(drainEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			f.drain(time.Now())
			return nil
		case now := <-tick.C:
			f.drain(now)
			if e.cfg.View != nil && now.Sub(f.looked) >= lookEvery {
				f.mu.Lock()
				f.look(e.cfg.View(), now)
				f.mu.Unlock()
				f.looked = now
			}
		}
	}
}

// drain counts all that the ring holds for us.
func (f *flows) drain(now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.reader == nil {
		return
	}
	f.now = now.UnixNano()
	began := time.Now()
	for {
		batch, lost := f.reader.Poll()
		if lost > 0 {
			f.lost += lost
			f.recover()
		}
		for _, x := range batch {
			f.apply(x)
		}
		if len(batch) == 0 && lost == 0 {
			break
		}
	}
	f.reader.Losses() // the tracer's account has them
	f.forget()
	f.took += time.Since(began)
}

// recover looks up the connections that are not known to have ended, as their
// ends may have been among the updates that were overrun.
func (f *flows) recover() {
	if f.find == nil {
		return
	}
	for id, c := range f.conns {
		if c.ended {
			continue
		}
		x, ok := f.find(id)
		switch {
		case ok:
			f.apply(x)
			// Its end was lost, and a correction was found.
			if x.Ended && !c.ended {
				f.end(c, x)
			}
		default:
			f.setOpen(c, c.endpoint, false)
			delete(f.conns, id)
			f.release(c)
		}
	}
}

// apply counts what an update adds to what is counted of its connection.
func (f *flows) apply(x *trace.Flow) {
	f.updates++
	c := f.conns[x.ID]
	if c != nil && x.Revision <= c.revision {
		return
	}
	s := f.serviceOf(x.Service.Name)
	e := s.endpoints[x.Backend.Addr]
	if e == nil {
		e = f.endpointOf(s, x.Backend.Addr, x.Backend.Pod)
	}
	if c == nil {
		c = f.begin(x, s, e)
	}
	c.revision = x.Revision
	if len(x.Attempts) != c.attempts {
		f.tries(c, x, s)
	}
	again := 0
	for i := range x.Attempts {
		again += x.Attempts[i].Retransmits
	}
	if again > c.retransmits {
		e.retransmits += float64(again - c.retransmits)
		c.retransmits = again
	}
	if x.Established >= 0 && !c.established {
		c.established = true
		e.establishedSum += x.Established.Seconds()
		e.establishedNumber++
		if h := f.latencyOf(s, e); h != nil {
			if h.establish == nil {
				h.establish = f.histogram(famEstablish, helpEstablish, f.cfg.EstablishBuckets)
			}
			h.establish.observe(x.Established, f.now, func() string { return f.traceOf(x) })
		}
	}
	if x.Outcome == trace.Unanswered && !c.unanswered {
		c.unanswered = true
		e.unanswered++
	}
	f.setOpen(c, e, x.Outcome == trace.Open && !x.Ended)
	if x.Completed && !c.ended {
		f.end(c, x)
	}
	if x.Counted {
		f.bytes(c, x, e)
	}
}

// begin counts a connection seen for the first time.
func (f *flows) begin(x *trace.Flow, s *service, e *endpoint) *conn {
	c := f.spare
	if c != nil {
		f.spare = c.next
		*c = conn{}
	} else {
		c = new(conn)
	}
	c.id, c.endpoint = x.ID, e
	f.conns[x.ID] = c
	if x.Existing {
		// What it did before us is not ours to count.
		c.out, c.in = x.Out, x.In
		c.established = true
		c.attempts = len(x.Attempts)
		return c
	}
	if x.Ended && !x.Completed {
		// It was counted before, and forgotten.
		c.ended, c.established, c.attempts = true, true, len(x.Attempts)
		f.remember(c)
		return c
	}
	e.started++
	if d := &x.Decision; d.Known && x.Backend.Addr.IsValid() {
		if d.Affinity != trace.AffinityHit {
			e.picks++
		}
		if d.AffinityTimeout > 0 || d.Affinity != trace.AffinityNone && d.Affinity != "" {
			word := string(d.Affinity)
			if word == "" {
				word = "unknown"
			}
			add(&s.affinity, s.labels, "decision", word, "", "")
		}
	}
	c.attempts = min(1, len(x.Attempts))
	return c
}

// tries counts what more attempts there are, and how the earlier ones ended.
func (f *flows) tries(c *conn, x *trace.Flow, s *service) {
	again := 0
	for i := range max(c.attempts-1, 0) {
		again += x.Attempts[i].Retransmits
	}
	for i := max(c.attempts, 1); i < len(x.Attempts); i++ {
		a, before := &x.Attempts[i], &x.Attempts[i-1]
		old := f.endpointOf(s, before.Endpoint.Addr, before.Endpoint.Pod)
		if again += before.Retransmits; again > c.retransmits {
			old.retransmits += float64(again - c.retransmits)
			c.retransmits = again
		}
		add(&old.failed, old.labels, "outcome", before.Outcome, "", "")
		e := f.endpointOf(s, a.Endpoint.Addr, a.Endpoint.Pod)
		if e == old {
			e.retries++
		} else {
			e.reroutes++
		}
	}
	c.attempts = len(x.Attempts)
}

// end counts how a connection ended.
func (f *flows) end(c *conn, x *trace.Flow) {
	e := c.endpoint
	s := e.service
	c.ended = true
	add(&e.ended, e.labels, "outcome", string(x.Outcome), "reason", string(x.Reason))
	if n := len(x.Attempts); n > 0 {
		switch last := x.Attempts[n-1].Outcome; last {
		case "refused", "unreachable", "timeout", "unanswered":
			add(&e.failed, e.labels, "outcome", last, "", "")
		}
	}
	f.clients.count(x, s)
	if x.Duration >= 0 && c.established {
		if h := f.latencyOf(s, e); h != nil {
			if h.duration == nil {
				h.duration = f.histogram(famDuration, helpDuration, f.cfg.DurationBuckets)
			}
			h.duration.observe(x.Duration, f.now, func() string { return f.traceOf(x) })
		}
	}
	f.setOpen(c, e, false)
	f.remember(c)
}

// bytes counts what is more than before.
func (f *flows) bytes(c *conn, x *trace.Flow, e *endpoint) {
	if x.Existing && !c.counted && c.out == (conntrack.Counters{}) && !x.Ended {
		c.out, c.in = x.Out, x.In // the first look is where we begin
	}
	c.counted = true
	grow := func(total, have *conntrack.Counters, now conntrack.Counters) {
		if now.Bytes >= have.Bytes && now.Packets >= have.Packets {
			total.Bytes += now.Bytes - have.Bytes
			total.Packets += now.Packets - have.Packets
			*have = now
		}
	}
	grow(&e.out, &c.out, x.Out)
	grow(&e.in, &c.in, x.In)
	e.hasBytes = true
}

// setOpen counts c as open at e, or not at all.
func (f *flows) setOpen(c *conn, e *endpoint, open bool) {
	if c.open && (!open || c.endpoint != e) {
		c.endpoint.open--
		c.open = false
	}
	c.endpoint = e
	if open && !c.open {
		e.open++
		c.open = true
	}
}

// latencyOf is where the histograms of a connection are, nil for nowhere.
func (f *flows) latencyOf(s *service, e *endpoint) *latency {
	switch f.cfg.Histograms {
	case HistogramsOff:
		return nil
	case HistogramsPerEndpoint:
		return &e.latency
	}
	return &s.latency
}

// traceOf is the id of the trace that tells of a Flow, empty if none does.
func (f *flows) traceOf(x *trace.Flow) string {
	if f.exemplar == nil || !f.exemplar(x) {
		return ""
	}
	return x.SpanContext().Trace.String()
}

// remember keeps c for counters that come later.
func (f *flows) remember(c *conn) {
	c.endedAt, c.next = f.now, nil
	if f.endedLast != nil {
		f.endedLast.next = c
	} else {
		f.endedFirst = c
	}
	f.endedLast = c
	f.endedCount++
}

// forget lets go of connections of which nothing more can come.
func (f *flows) forget() {
	for c := f.endedFirst; c != nil; c = f.endedFirst {
		if f.endedCount <= keepEnded && f.now-c.endedAt < int64(endedKept) {
			return
		}
		if f.endedFirst = c.next; f.endedFirst == nil {
			f.endedLast = nil
		}
		f.endedCount--
		delete(f.conns, c.id)
		f.release(c)
	}
}

func (f *flows) release(c *conn) {
	c.endpoint, c.next = nil, f.spare
	f.spare = c
}

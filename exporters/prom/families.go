package prom

import (
	"math"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
)

const (
	famEstablish  = "kptrace_connection_establish_seconds"
	helpEstablish = "Time from a connection's first SYN to its SYN-ACK, as the node saw them; for UDP from the first datagram to the first reply."
	famDuration   = "kptrace_connection_duration_seconds"
	helpDuration  = "Time from an established connection's first packet to its first FIN or RST; for UDP to the last packet known."
)

// flowFamily is one metric about connections: what it is called, and its value in
// the series of a Service, an endpoint, or of all of it.
type flowFamily struct {
	name, help string
	kind       dto.MetricType
	service    func(*gathering, *service)
	endpoint   func(*gathering, *endpoint)
	whole      func(*gathering, *flows)
}

// gathering is a family's part of a scrape.
type gathering struct {
	arena   *arena
	counter bool
	metrics []*dto.Metric
}

func (g *gathering) add(labels []*dto.LabelPair, v float64) {
	g.metrics = append(g.metrics, g.arena.of(g.counter, labels, v))
}

func (g *gathering) each(list []counted) {
	for i := range list {
		g.add(list[i].labels, list[i].n)
	}
}

func (g *gathering) histogram(h *latencyHistogram, labels []*dto.LabelPair) {
	if h == nil {
		return
	}
	m := &g.arena.next().metric
	if h.Write(m) == nil {
		m.Label = labels
		g.metrics = append(g.metrics, m)
	}
}

// perEndpoint is a family whose value f has for each endpoint; where it
// reports false there is none.
func perEndpoint(f func(*endpoint) (float64, bool)) func(*gathering, *endpoint) {
	return func(g *gathering, e *endpoint) {
		if v, ok := f(e); ok {
			g.add(e.labels, v)
		}
	}
}

// used is for counters that every endpoint has which was ever picked, at zero
// too, so that the first one counts as an increase.
func used(value func(*endpoint) float64) func(*gathering, *endpoint) {
	return perEndpoint(func(e *endpoint) (float64, bool) { return value(e), e.addr.IsValid() })
}

// some is for counters that few endpoints ever have.
func some(value func(*endpoint) float64) func(*gathering, *endpoint) {
	return perEndpoint(func(e *endpoint) (float64, bool) { v := value(e); return v, v != 0 })
}

// direction has the two series of what is counted both ways.
func direction(f *flows, out, in func(*endpoint) uint64) func(*gathering, *endpoint) {
	return func(g *gathering, e *endpoint) {
		if !e.hasBytes {
			return
		}
		if e.outLabels == nil {
			e.outLabels, e.inLabels = with(e.labels, f.directions[0]), with(e.labels, f.directions[1])
		}
		g.add(e.outLabels, float64(out(e)))
		g.add(e.inLabels, float64(in(e)))
	}
}

// flowFamilies are the families about connections, by name.
func (f *flows) flowFamilies() []flowFamily {
	counter, gauge := dto.MetricType_COUNTER, dto.MetricType_GAUGE
	return []flowFamily{
		{
			name: "kptrace_affinity_decisions_total", kind: counter,
			help:    "Decisions about connections to Services with session affinity: hit, new, expired, evicted, reset, unknown.",
			service: func(g *gathering, s *service) { g.each(s.affinity) },
		},
		{
			name: "kptrace_bytes_total", kind: counter,
			help: "Bytes of connections with their IP headers, in from the endpoint and out to it, as the connection tracking entry counted them. Those of a connection nobody follows come when its entry goes, up to two minutes after its end.",
			endpoint: direction(f, func(e *endpoint) uint64 { return e.out.Bytes },
				func(e *endpoint) uint64 { return e.in.Bytes }),
		},
		{
			name: "kptrace_client_connections_total", kind: counter,
			help:  "Connections that ended, by client: a pod, or an address without a namespace. Only with --metrics-clients; the least active clients share the name other.",
			whole: (*gathering).clients,
		},
		{
			name: famDuration, help: helpDuration, kind: dto.MetricType_HISTOGRAM,
			service:  func(g *gathering, s *service) { g.histogram(s.latency.duration, s.labels) },
			endpoint: func(g *gathering, e *endpoint) { g.histogram(e.latency.duration, e.labels) },
		},
		{
			name: famEstablish, help: helpEstablish, kind: dto.MetricType_HISTOGRAM,
			service:  func(g *gathering, s *service) { g.histogram(s.latency.establish, s.labels) },
			endpoint: func(g *gathering, e *endpoint) { g.histogram(e.latency.establish, e.labels) },
		},
		{
			name: "kptrace_connections_ended_total", kind: counter,
			help:     "Connections that ended, by outcome (closed, refused, reset, timeout, rejected, dropped, unknown) and, where one went wrong, its reason. The endpoint is empty where none was picked.",
			endpoint: func(g *gathering, e *endpoint) { g.each(e.ended) },
		},
		{
			name: "kptrace_connections_open", kind: gauge,
			help:     "Connections that are established and have not ended.",
			endpoint: perEndpoint(func(e *endpoint) (float64, bool) { return float64(e.open), e.addr.IsValid() }),
		},
		{
			name: "kptrace_connections_started_total", kind: counter,
			help:     "New connections to a Service port, by the endpoint that was picked first; it is empty where none was.",
			endpoint: perEndpoint(func(e *endpoint) (float64, bool) { return e.started, true }),
		},
		{
			name: "kptrace_connections_unanswered_total", kind: counter,
			help:     "Connections that had no answer for a second. Some are answered later.",
			endpoint: used(func(e *endpoint) float64 { return e.unanswered }),
		},
		{
			name: "kptrace_endpoint_establish_seconds", kind: dto.MetricType_SUMMARY,
			help:     "Sum and number of the times to establish by endpoint, for its mean.",
			endpoint: (*gathering).establish,
		},
		{
			name: "kptrace_expected_share_ratio", kind: gauge,
			help:     "Share of a Service's picks that the endpoint should get by the rules in force, from 0 to 1.",
			endpoint: perEndpoint(func(e *endpoint) (float64, bool) { return e.share, e.share >= 0 }),
		},
		{
			name: "kptrace_failed_attempts_total", kind: counter,
			help:     "Attempts to reach an endpoint that did not establish a connection, by outcome: refused, unreachable, timeout, unanswered, reset.",
			endpoint: func(g *gathering, e *endpoint) { g.each(e.failed) },
		},
		{
			name: "kptrace_packets_total", kind: counter,
			help: "Packets of connections, in from the endpoint and out to it, as kptrace_bytes_total.",
			endpoint: direction(f, func(e *endpoint) uint64 { return e.out.Packets },
				func(e *endpoint) uint64 { return e.in.Packets }),
		},
		{
			name: "kptrace_picks_total", kind: counter,
			help:     "Picks of the endpoint by the mode's algorithm: new connections without those that session affinity decided. Reroutes are no picks.",
			endpoint: used(func(e *endpoint) float64 { return e.picks }),
		},
		{
			name: "kptrace_reroutes_total", kind: counter,
			help:     "Attempts to reach this endpoint after another one had failed.",
			endpoint: some(func(e *endpoint) float64 { return e.reroutes }),
		},
		{
			name: "kptrace_retries_total", kind: counter,
			help:     "Attempts to reach this endpoint again after it had failed for the same connection.",
			endpoint: some(func(e *endpoint) float64 { return e.retries }),
		},
		{
			name: "kptrace_service_endpoints", kind: gauge,
			help:    "Endpoints of a Service port by state: ready, waiting (neither ready nor terminating), terminating.",
			service: (*gathering).states,
		},
		{
			name: "kptrace_syn_retransmits_total", kind: counter,
			help:     "SYNs that a client sent again.",
			endpoint: used(func(e *endpoint) float64 { return e.retransmits }),
		},
	}
}

func (g *gathering) clients(f *flows) {
	for _, c := range f.clients.all {
		for i := range c.counts {
			g.add(c.counts[i].labels, c.counts[i].n)
		}
	}
	for i := range f.clients.rest.counts {
		g.add(f.clients.rest.counts[i].labels, f.clients.rest.counts[i].n)
	}
}

func (g *gathering) establish(e *endpoint) {
	if e.establishedNumber == 0 {
		return
	}
	n, sum := uint64(e.establishedNumber), e.establishedSum
	m := &g.arena.next().metric
	m.Label, m.Summary = e.labels, &dto.Summary{SampleCount: &n, SampleSum: &sum}
	g.metrics = append(g.metrics, m)
}

func (g *gathering) states(s *service) {
	if !s.known || s.name.Namespace == "" {
		return
	}
	if s.stateLabels[0] == nil {
		for i, word := range [...]string{"ready", "waiting", "terminating"} {
			s.stateLabels[i] = with(s.labels, pair("state", word))
		}
	}
	for i, n := range [...]int{s.ready, s.waiting, s.terminating} {
		g.add(s.stateLabels[i], float64(n))
	}
}

// gather makes the families of a scrape, ordered by name. What it returns is
// a's and holds until that is given back.
func (f *flows) gather(a *arena) []*dto.MetricFamily {
	f.mu.Lock()
	defer f.mu.Unlock()
	families := f.flowFamilies()
	for len(a.lists) < len(families) {
		a.lists = append(a.lists, nil)
	}
	all := make([]*dto.MetricFamily, 0, len(families))
	f.series = 0
	for i := range families {
		x := &families[i]
		g := gathering{arena: a, counter: x.kind == dto.MetricType_COUNTER, metrics: a.lists[i]}
		for _, s := range f.list {
			if x.service != nil {
				x.service(&g, s)
			}
			if x.endpoint != nil {
				for _, e := range s.list {
					x.endpoint(&g, e)
				}
			}
		}
		if x.whole != nil {
			x.whole(&g, f)
		}
		a.lists[i] = g.metrics
		f.series += len(g.metrics)
		if len(g.metrics) > 0 {
			all = append(all, &dto.MetricFamily{Name: &x.name, Help: &x.help, Type: x.kind.Enum(), Metric: g.metrics})
		}
	}
	return all
}

// gatherer joins the registry's metrics with those about connections. The
// latter need none of the registry's checks, which cost more than all the
// rest where there are many endpoints; tests make them.
type gatherer struct{ *Exporter }

// Gather is called by the HTTP handler, and done when all is written.
func (g gatherer) Gather() (families []*dto.MetricFamily, done func(), err error) {
	now := time.Now()
	a := g.arenas.get()
	var ours []*dto.MetricFamily
	if !g.cfg.Untraced {
		g.flows.drain(now)
		if g.cfg.View != nil {
			g.flows.mu.Lock()
			g.flows.look(g.cfg.View(), now)
			g.flows.mu.Unlock()
		}
		ours = g.flows.gather(a)
	}
	theirs, err := g.registry.Gather()
	families = make([]*dto.MetricFamily, 0, len(ours)+len(theirs))
	for len(ours) > 0 && len(theirs) > 0 {
		if strings.Compare(ours[0].GetName(), theirs[0].GetName()) < 0 {
			families, ours = append(families, ours[0]), ours[1:]
		} else {
			families, theirs = append(families, theirs[0]), theirs[1:]
		}
	}
	families = append(append(families, ours...), theirs...)
	return families, func() {
		g.arenas.put(a)
		g.flows.mu.Lock()
		g.flows.scrapes++
		g.flows.scraping += time.Since(now)
		g.flows.mu.Unlock()
	}, err
}

// seconds of a duration, as a float that has no more digits than it should.
func secondsOf(d time.Duration) float64 { return math.Round(d.Seconds()*1e9) / 1e9 }

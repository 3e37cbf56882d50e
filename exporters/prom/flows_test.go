package prom

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// world is an Exporter with a ring to publish to.
type world struct {
	t    testing.TB
	ring *trace.Ring
	e    *Exporter
	view *proxy.View
	next trace.FlowID
}

func newWorld(t testing.TB, flows FlowConfig, services ...proxy.Service) *world {
	w := &world{t: t, ring: trace.NewRing(1 << 10)}
	w.see(services...)
	w.e = New(Config{
		Version: "v1", Families: []string{IPv4}, Mode: proxy.IPTables, Flows: flows,
		Sync: func() proxy.SyncStats { return proxy.SyncStats{} },
		View: func() *proxy.View { return w.view }, Exemplar: func(*trace.Flow) bool { return true },
	})
	w.e.flows.reader = w.ring.NewReader()
	return w
}

// see makes the services the newest View.
func (w *world) see(services ...proxy.Service) {
	w.view = &proxy.View{Mode: proxy.IPTables, Snapshot: &proxy.Snapshot{Services: services}, Done: time.Unix(1, 0)}
}

func endpointAt(n int) proxy.Endpoint {
	return proxy.Endpoint{
		Addr:  netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}), 8080),
		Ready: true, Serving: true, Namespace: "shop", Pod: fmt.Sprintf("foo-%d", n),
	}
}

func named(name string, endpoints ...proxy.Endpoint) proxy.Service {
	s := servicePort(name, false, endpoints...)
	s.Name.Proto = conntrack.TCP
	return s
}

// pending is the first revision of a connection to an endpoint of a Service.
func (w *world) pending(s proxy.Service, ep proxy.Endpoint) *trace.Flow {
	w.next++
	return &trace.Flow{
		ID: w.next, Revision: 1, Node: "node1", Start: time.Unix(100, 0),
		Client:  trace.Peer{Addr: netip.MustParseAddrPort("10.0.9.9:1000"), Namespace: "shop", Pod: "web"},
		Service: trace.ServiceRef{Name: s.Name}, Backend: trace.Peer{Addr: ep.Addr, Namespace: ep.Namespace, Pod: ep.Pod},
		Decision:    trace.Decision{Known: true, Affinity: trace.AffinityNone, Probability: 0.5},
		Attempts:    []trace.Attempt{{Endpoint: trace.Peer{Addr: ep.Addr, Pod: ep.Pod}, Outcome: "pending", Latency: -1}},
		Established: -1, Duration: -1, Outcome: trace.Pending,
	}
}

// publish publishes the next revision of f, changed by edit.
func (w *world) publish(f *trace.Flow, edit func(*trace.Flow)) *trace.Flow {
	next := *f
	next.Revision++
	next.Completed = false
	next.Attempts = append([]trace.Attempt(nil), f.Attempts...)
	edit(&next)
	w.ring.Publish(&next)
	return &next
}

func established(f *trace.Flow) {
	f.Outcome, f.Established = trace.Open, 800*time.Microsecond
	f.Attempts[len(f.Attempts)-1].Outcome = "established"
}

func ended(o trace.Outcome, why trace.Reason) func(*trace.Flow) {
	return func(f *trace.Flow) {
		f.Outcome, f.Reason, f.Ended, f.Completed = o, why, true, true
		f.Duration = 32 * time.Millisecond
		if o == trace.Refused || o == trace.Timeout {
			f.Attempts[len(f.Attempts)-1].Outcome = string(o)
		}
	}
}

func countedBytes(out, in uint64) func(*trace.Flow) {
	return func(f *trace.Flow) {
		f.Counted = true
		f.Out, f.In = conntrack.Counters{Packets: 5, Bytes: out}, conntrack.Counters{Packets: 4, Bytes: in}
	}
}

// busy is a world in which everything happened once.
func busy(t testing.TB, cfg FlowConfig) *world {
	a, b := endpointAt(1), endpointAt(2)
	foo, sticky, empty := named("foo", a, b), named("sticky", a), named("empty")
	w := newWorld(t, cfg, foo, sticky, empty)
	publish := func(f *trace.Flow) *trace.Flow { w.ring.Publish(f); return f }

	f := publish(w.pending(foo, a))
	f = w.publish(f, established)
	f = w.publish(f, ended(trace.Closed, ""))
	w.publish(f, countedBytes(1000, 5000))

	w.publish(publish(w.pending(foo, a)), established) // stays open

	f = publish(w.pending(foo, b))
	w.publish(f, ended(trace.Refused, trace.EndpointRefused))

	f = publish(w.pending(foo, b))
	f = w.publish(f, func(f *trace.Flow) { f.Outcome, f.Attempts[0].Retransmits = trace.Unanswered, 1 })
	f = w.publish(f, func(f *trace.Flow) { // another endpoint, and then it works
		f.Attempts[0].Outcome, f.Attempts[0].Retransmits = "timeout", 2
		f.Backend = trace.Peer{Addr: a.Addr, Pod: a.Pod}
		f.Attempts = append(f.Attempts, trace.Attempt{Endpoint: f.Backend, Outcome: "pending"})
	})
	f = w.publish(f, established)
	w.publish(f, ended(trace.Reset, trace.ResetByClient))

	f = w.pending(sticky, a)
	f.Decision.Affinity, f.Decision.AffinityTimeout = trace.AffinityHit, time.Hour
	f.Attempts = append(f.Attempts, f.Attempts[0]) // tried again
	f.Attempts[0].Outcome = "unreachable"
	w.publish(publish(f), ended(trace.Timeout, trace.SynUnanswered))

	f = w.pending(empty, proxy.Endpoint{})
	f.Attempts = nil
	f.Decision = trace.Decision{Known: true, Affinity: trace.AffinityNone}
	w.publish(f, ended(trace.Rejected, trace.NoEndpoints))
	return w
}

// gathered checks families as a registry would, and returns them.
func gathered(t testing.TB, e *Exporter) []*dto.MetricFamily {
	t.Helper()
	families, done, err := gatherer{e}.Gather()
	defer done()
	if err != nil {
		t.Fatal(err)
	}
	checked, err := prometheus.Gatherers{prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) { return families, nil })}.Gather()
	if err != nil {
		t.Fatalf("what a registry would refuse: %v", err)
	}
	return checked
}

// TestConnections compares the series of connections, all of them, with what
// happened.
func TestConnections(t *testing.T) {
	w := busy(t, FlowConfig{Clients: 2})
	gathered(t, w.e)
	var got bytes.Buffer
	for line := range strings.Lines(scrape(t, w.e)) {
		name := strings.TrimPrefix(strings.TrimPrefix(line, "# HELP "), "# TYPE ")
		if flowName(w.e, name) {
			got.WriteString(line)
		}
	}
	golden(t, "testdata/connections.txt", got.Bytes())
}

func flowName(e *Exporter, line string) bool {
	for _, f := range e.flows.flowFamilies() {
		if strings.HasPrefix(line, f.name) {
			return true
		}
	}
	return false
}

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("differs from %s (UPDATE_GOLDEN=1 writes it):\n%s", file, got)
	}
}

// value is that of one series, -1 if it is absent.
func value(t testing.TB, e *Exporter, name string, labels ...string) float64 {
	t.Helper()
	for _, f := range gathered(t, e) {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			have := map[string]string{}
			for _, l := range m.GetLabel() {
				have[l.GetName()] = l.GetValue()
			}
			match := true
			for i := 0; i < len(labels); i += 2 {
				match = match && have[labels[i]] == labels[i+1]
			}
			if match {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return -1
}

// TestStale: series go when their endpoint left, but for those in use.
func TestStale(t *testing.T) {
	a, b := endpointAt(1), endpointAt(2)
	w := newWorld(t, FlowConfig{StaleAfter: time.Minute}, named("foo", a, b))
	open := w.publish(w.pending(named("foo"), b), established)
	w.publish(w.publish(w.pending(named("foo"), a), established), ended(trace.Closed, ""))
	has := func(addr string) bool {
		return value(t, w.e, "kptrace_connections_started_total", "endpoint", addr) > 0
	}
	later := func(d time.Duration) {
		w.e.flows.mu.Lock()
		defer w.e.flows.mu.Unlock()
		w.e.flows.look(w.view, time.Now().Add(d))
	}
	if !has("10.0.0.1:8080") || !has("10.0.0.2:8080") {
		t.Fatal("series are missing")
	}
	if got := value(t, w.e, "kptrace_expected_share_ratio", "endpoint", "10.0.0.1:8080"); got != 0.5 {
		t.Errorf("expected share %v", got)
	}
	later(time.Hour)
	if !has("10.0.0.1:8080") {
		t.Fatal("dropped although it is there")
	}
	w.see()
	later(0)
	later(30 * time.Second)
	if !has("10.0.0.1:8080") {
		t.Error("dropped at once")
	}
	later(2 * time.Minute)
	if has("10.0.0.1:8080") || !has("10.0.0.2:8080") {
		t.Error("the first should be gone, and the other stay for its open connection")
	}
	w.publish(open, ended(trace.Closed, ""))
	w.e.flows.drain(time.Now())
	later(2 * time.Minute)
	if len(w.e.flows.services) != 0 || w.e.flows.endpoints != 0 || len(w.e.flows.list) != 0 {
		t.Errorf("left: %d services, %d endpoints", len(w.e.flows.services), w.e.flows.endpoints)
	}
	if got := value(t, w.e, "kptrace_metrics_dropped_endpoints_total"); got != 2 {
		t.Errorf("%v dropped", got)
	}
}

// TestBounds: what is over the bounds is counted together, and nothing is lost.
func TestBounds(t *testing.T) {
	w := newWorld(t, FlowConfig{MaxEndpoints: 3, MaxServices: 2, Clients: 2})
	for i := range 40 {
		f := w.pending(named(fmt.Sprintf("s%d", i%4)), endpointAt(i))
		f.Client.Pod = fmt.Sprintf("web-%d", i%5)
		w.publish(f, ended(trace.Closed, ""))
	}
	sum := func(name string) (total float64, series int) {
		for _, f := range gathered(t, w.e) {
			if f.GetName() == name {
				for _, m := range f.GetMetric() {
					total += m.GetCounter().GetValue()
				}
				series = len(f.GetMetric())
			}
		}
		return total, series
	}
	for _, tt := range []struct {
		name string
		most int
	}{
		{"kptrace_connections_started_total", 3 + 3},
		{"kptrace_connections_ended_total", 3 + 3},
		{"kptrace_client_connections_total", 3 * 3},
	} {
		if total, series := sum(tt.name); total != 40 || series > tt.most {
			t.Errorf("%s: %v in %d series, want 40 in at most %d", tt.name, total, series, tt.most)
		}
	}
	if value(t, w.e, "kptrace_connections_started_total", "service", other, "endpoint", other) <= 0 {
		t.Error("nothing under other")
	}
	if value(t, w.e, "kptrace_metrics_folded_updates_total") <= 0 {
		t.Error("folding does not show")
	}
}

// TestOverrun: updates that were overrun are counted, and no connection stays
// open for ever.
func TestOverrun(t *testing.T) {
	a := endpointAt(1)
	w := newWorld(t, FlowConfig{}, named("foo", a))
	history := trace.NewHistory(trace.HistoryConfig{})
	w.e.flows.find = history.Get
	known := w.publish(w.pending(named("foo"), a), established)
	gone := w.publish(w.pending(named("foo"), a), established)
	_ = gone
	w.e.flows.drain(time.Now())
	if got := value(t, w.e, "kptrace_connections_open"); got != 2 {
		t.Fatalf("%v open", got)
	}
	end := w.publish(known, ended(trace.Closed, ""))
	late := *end
	late.Revision, late.Completed = late.Revision+1, false
	countedBytes(10, 20)(&late)
	history.Put(&late)
	for range 1 << 11 {
		w.publish(w.pending(named("foo"), a), ended(trace.Closed, ""))
	}
	if got := value(t, w.e, "kptrace_connections_open"); got != 0 {
		t.Errorf("%v open", got)
	}
	started, closed := value(t, w.e, "kptrace_connections_started_total"), value(t, w.e, "kptrace_connections_ended_total")
	if started != 2+1<<10 || closed != 1+1<<10 {
		t.Errorf("started %v, closed %v", started, closed)
	}
	if got := value(t, w.e, "kptrace_metrics_lost_updates_total"); got != 1<<10+1 {
		t.Errorf("%v lost", got)
	}
	if got := value(t, w.e, "kptrace_bytes_total", "direction", "in"); got != 20 {
		t.Errorf("%v bytes", got)
	}
}

type scheduled struct {
	proxy.Program
	algorithm string
}

func (p scheduled) Walk(proxy.Packet) proxy.Outcome { return proxy.Outcome{Algorithm: p.algorithm} }

// TestShares: IPVS' schedulers weigh, or promise nothing.
func TestShares(t *testing.T) {
	a, b := endpointAt(1), endpointAt(2)
	a.Weight = 3
	foo := named("foo", a, b)
	for algorithm, want := range map[string]float64{"rr": 0.5, "wrr": 0.75, "lc": -1} {
		w := newWorld(t, FlowConfig{}, foo)
		w.view.Mode, w.view.Program = proxy.IPVS, scheduled{algorithm: algorithm}
		w.e.cfg.View = nil // no other metrics of a Program that has no more
		w.publish(w.pending(foo, a), established)
		w.e.flows.drain(time.Now())
		w.e.flows.look(w.view, time.Now())
		if got := value(t, w.e, "kptrace_expected_share_ratio", "endpoint", a.Addr.String()); got != want {
			t.Errorf("%s: %v, want %v", algorithm, got, want)
		}
	}
}

// TestExisting: a connection older than kptrace counts from the first look on.
func TestExisting(t *testing.T) {
	a := endpointAt(1)
	w := newWorld(t, FlowConfig{}, named("foo", a))
	f := w.pending(named("foo"), a)
	f.Existing, f.Outcome = true, trace.Open
	countedBytes(1000, 1000)(f)
	f = w.publish(f, func(*trace.Flow) {})
	f = w.publish(f, countedBytes(1500, 1200))
	if got := value(t, w.e, "kptrace_bytes_total", "direction", "out"); got != 500 {
		t.Errorf("%v bytes", got)
	}
	if started, open := value(t, w.e, "kptrace_connections_started_total"), value(t, w.e, "kptrace_connections_open"); started != 0 || open != 1 {
		t.Errorf("started %v, open %v", started, open)
	}
	w.publish(f, ended(trace.Closed, ""))
	if got := value(t, w.e, "kptrace_connections_ended_total", "outcome", "closed"); got != 1 {
		t.Errorf("%v ended", got)
	}
}

// TestRun: Run counts without being scraped, and ends with its context.
func TestRun(t *testing.T) {
	a := endpointAt(1)
	w := newWorld(t, FlowConfig{Histograms: HistogramsPerEndpoint}, named("foo", a))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.e.Run(ctx, w.ring.NewReader()) }()
	deadline := time.Now().Add(10 * time.Second)
	for {
		w.publish(w.pending(named("foo"), a), established)
		w.e.flows.mu.Lock()
		n := len(w.e.flows.conns)
		w.e.flows.mu.Unlock()
		if n > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nothing is counted")
		}
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := value(t, w.e, famEstablish, "endpoint", "10.0.0.1:8080", "pod", "foo-1"); got < 1 {
		t.Errorf("%v in the histogram", got)
	}
}

func TestFlowConfig(t *testing.T) {
	for want, c := range map[string]FlowConfig{
		"":                 {Clients: 3, ClientAllow: []string{"shop/*"}},
		"EstablishBuckets": {EstablishBuckets: []float64{2, 1}},
		"DurationBuckets":  {DurationBuckets: []float64{0, 1}},
		"use off, service": {Histograms: "pod"},
		"below 0":          {Clients: -1},
		"ClientAllow":      {ClientAllow: []string{"["}},
	} {
		err := c.Validate()
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", c, err, want)
		}
	}
}

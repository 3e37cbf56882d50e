package prom

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"syscall"
	"testing"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// big is a world of n Services with m endpoints each, all of them in use.
func big(t testing.TB, n, m int) *world {
	services := make([]proxy.Service, n)
	for i := range services {
		s := named(fmt.Sprintf("service-%d", i))
		for j := range m {
			s.Endpoints = append(s.Endpoints, endpointAt(i*m+j))
		}
		services[i] = s
	}
	w := newWorld(t, FlowConfig{MaxEndpoints: n * m}, services...)
	for i := range services {
		for j := range services[i].Endpoints {
			f := w.publish(w.pending(services[i], services[i].Endpoints[j]), established)
			f = w.publish(f, ended(trace.Closed, ""))
			w.publish(f, countedBytes(1000, 5000))
		}
		w.e.flows.drain(time.Now())
	}
	return w
}

// counter is a ResponseWriter that counts.
type counterWriter struct {
	header http.Header
	bytes  int
}

func (c *counterWriter) Header() http.Header         { return c.header }
func (c *counterWriter) WriteHeader(int)             {}
func (c *counterWriter) Write(b []byte) (int, error) { c.bytes += len(b); return len(b), nil }

// BenchmarkScrape is a scrape of 5,000 Services with 10 endpoints each, all in
// use: every series about connections that there can be without failures.
func BenchmarkScrape(b *testing.B) {
	w := big(b, 5000, 10)
	for name, header := range map[string]http.Header{
		"openmetrics": {"Accept": {"application/openmetrics-text;version=1.0.0"}},
		"gzip":        {"Accept": {"application/openmetrics-text;version=1.0.0"}, "Accept-Encoding": {"gzip"}},
		"protobuf":    {"Accept": {"application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"}},
	} {
		b.Run(name, func(b *testing.B) {
			req := httptest.NewRequest(http.MethodGet, "/metrics", nil)
			req.Header = header
			h := w.e.Handler()
			b.ReportAllocs()
			out := &counterWriter{header: http.Header{}}
			before := processorTime()
			for b.Loop() {
				*out = counterWriter{header: http.Header{}}
				h.ServeHTTP(out, req)
			}
			b.ReportMetric((processorTime()-before).Seconds()/float64(b.N), "cpu-s/scrape")
			b.ReportMetric(float64(out.bytes)/1e6, "MB/scrape")
			b.ReportMetric(float64(w.e.flows.series), "series/scrape")
		})
	}
}

// processorTime is what this process has used. Unlike the time that passes it
// does not depend on who else runs.
func processorTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// connections are the updates of n connections as the correlator makes them
// while nobody follows: answered and ended at once, then its bytes.
func connections(w *world, n int) []*trace.Flow {
	s := named("foo", endpointAt(1), endpointAt(2))
	w.see(s)
	list := make([]*trace.Flow, 0, 2*n)
	for i := range n {
		f := w.pending(s, s.Endpoints[i%2])
		established(f)
		ended(trace.Closed, "")(f)
		late := *f
		late.Revision, late.Completed = 2, false
		countedBytes(1000, 5000)(&late)
		list = append(list, f, &late)
	}
	return list
}

// BenchmarkCount is what one connection costs the metrics.
func BenchmarkCount(b *testing.B) {
	w := newWorld(b, FlowConfig{})
	list := connections(w, 1)
	w.e.flows.exemplar = nil
	b.ReportAllocs()
	id := trace.FlowID(0)
	for b.Loop() {
		id++
		for _, f := range list {
			f.ID = id
			w.e.flows.apply(f)
		}
		w.e.flows.now += int64(time.Millisecond)
		w.e.flows.forget()
	}
}

// TestCountAllocs: counting a connection allocates nothing once its endpoint
// is known and the table has grown.
func TestCountAllocs(t *testing.T) {
	w := newWorld(t, FlowConfig{})
	const n = 2000
	list := connections(w, n)
	w.e.flows.exemplar = nil
	round := func() {
		for _, f := range list {
			w.e.flows.apply(f)
		}
		w.e.flows.now += int64(2 * endedKept)
		w.e.flows.forget()
	}
	round()
	if got := testing.AllocsPerRun(5, round); got > n/50 {
		t.Errorf("%v allocations for %d connections", got, n)
	}
}

// TestScrapeAllocs: a scrape allocates little for each endpoint.
func TestScrapeAllocs(t *testing.T) {
	w := big(t, 50, 10)
	h := w.e.Handler()
	req := httptest.NewRequest(http.MethodGet, "/metrics", nil)
	one := func() { h.ServeHTTP(&counterWriter{header: http.Header{}}, req) }
	one()
	if got := testing.AllocsPerRun(5, one); got/500 > 60 {
		t.Errorf("%.1f allocations for each endpoint", got/500)
	}
}

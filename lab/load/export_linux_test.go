package load

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/lab"
)

// sinkAddr is where a node's collector listens, in the node's namespace.
const sinkAddr = "127.0.0.1:4318"

// sink is the cheapest of collectors: it takes whatever comes.
type sink struct {
	requests, bytes atomic.Int64
}

func (s *sink) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n, _ := io.Copy(io.Discard, r.Body)
	s.requests.Add(1)
	s.bytes.Add(n)
	w.WriteHeader(http.StatusOK)
}

// collector runs a sink on the node until stop is called or the test ends.
func (p *place) collector() (*sink, func()) {
	p.w.t.Helper()
	var l net.Listener
	err := p.w.lab.Do(lab.NodeSpace(p.name), func() (err error) {
		l, err = new(net.ListenConfig).Listen(context.Background(), "tcp4", sinkAddr)
		return err
	})
	if err != nil {
		p.w.t.Fatal(err)
	}
	s := &sink{}
	srv := &http.Server{Handler: s, ReadHeaderTimeout: 10 * time.Second}
	go func() { _ = srv.Serve(l) }()
	stop := func() { _ = srv.Close() }
	p.w.t.Cleanup(stop)
	return s, stop
}

// exportCase is a way to export, to be compared with not exporting.
type exportCase struct {
	name      string
	args      []string
	collector bool
}

func exportCases() []exportCase {
	metrics, to := "-metrics=127.0.0.1:10249", "-otlp=http://"+sinkAddr
	return []exportCase{
		{"tracing alone", nil, false},
		{"metrics", []string{metrics}, false},
		{"metrics, 10 % of spans", []string{metrics, to, "-sample=0.1"}, true},
		{"metrics, all spans", []string{metrics, to, "-sample=1"}, true},
		{"metrics, all spans, collector away", []string{metrics, to, "-sample=1"}, false},
	}
}

// BenchmarkExport measures what exporters cost kptrace: processor time and
// memory of its process at 5,000 new connections a second, or as many as the
// machine makes. Nodes stand side by side and are measured in turn, so that
// what disturbs one disturbs all.
func BenchmarkExport(b *testing.B) {
	rounds, each := 7, 2*time.Second
	if os.Getenv("BENCH_SHORT") != "" {
		rounds, each = 1, 300*time.Millisecond
	}
	for b.Loop() { // once: it takes longer than a benchtime
		benchmarkExport(b, rounds, each)
	}
}

func benchmarkExport(b *testing.B, rounds int, each time.Duration) {
	b.Helper()
	cases := exportCases()
	w := newWorld(b, len(cases))
	places := make([]*place, len(cases))
	for i, c := range cases {
		places[i] = w.place(i)
		if c.collector {
			places[i].collector()
		}
		places[i].watcher = places[i].proxy(c.args...)
	}
	costs := make([][]float64, len(cases)) // microseconds of the watcher per connection
	rates := make([]float64, len(cases))
	for range rounds {
		for i, p := range places {
			before := cpu(b, p.watcher.PID())
			r, err := p.run(context.Background(), Config{Duration: each, Rate: 5000, Concurrency: 64})
			if err != nil || r.Done == 0 {
				b.Fatalf("%s: %v %v", cases[i].name, r.String(), err)
			}
			p.flush()
			// What waits to be sent is sent within the delay of a batch.
			time.Sleep(1500 * time.Millisecond)
			costs[i] = append(costs[i], float64((cpu(b, p.watcher.PID())-before).Microseconds())/float64(r.Done))
			rates[i] += r.PerSecond / float64(rounds)
		}
	}
	tw := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "exports\tconns/s\twatcher, µs/conn\tagainst tracing alone\tresident\tpeak\tconnections")
	median := func(l []float64) float64 { l = slices.Sorted(slices.Values(l)); return l[len(l)/2] }
	base := median(costs[0])
	for i, p := range places {
		rss, peak := memoryOf(b, p.watcher.PID())
		fmt.Fprintf(tw, "%s\t%.0f\t%.1f (%.1f to %.1f)\t%+.0f %%\t%d MB\t%d MB\t%s\n", cases[i].name, rates[i],
			median(costs[i]), slices.Min(costs[i]), slices.Max(costs[i]), 100*(median(costs[i])/base-1), rss>>20, peak>>20, exported(p.status()))
	}
	tw.Flush()
	b.ReportMetric(median(costs[2])/base, "cpu-ratio")
}

// exported says what became of a node's connections.
func exported(s *relay.Status) string {
	for _, e := range s.Exports {
		return fmt.Sprintf("%d seen, %d sent, %d dropped", e.Seen, e.Sent, e.Dropped)
	}
	return ""
}

// memoryOf reads how much memory a process has, and had at most.
func memoryOf(t testing.TB, pid int) (rss, peak int64) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var kb int64
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kb); err == nil {
			rss = kb << 10
		}
		if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &kb); err == nil {
			peak = kb << 10
		}
	}
	return rss, peak
}

// TestCollectorAwayUnderLoad takes the collector away while connections are
// made as fast as the machine can: all of them work and are shown to who
// follows, those that find the queue full are counted to the last, and when
// the collector is back the queue drains by itself.
func TestCollectorAwayUnderLoad(t *testing.T) {
	away := 5 * time.Second
	if d, err := time.ParseDuration(os.Getenv("KPTRACE_OUTAGE")); err == nil {
		away = d
	}
	w := newWorld(t, 1)
	p := w.place(0)
	got, stop := p.collector()
	p.watcher = p.proxy("-otlp=http://"+sinkAddr, "-sample=1")
	f := p.follow()
	made := 0
	load := func(d time.Duration) {
		t.Helper()
		r, err := p.run(t.Context(), Config{Duration: d, Rate: 3000})
		if err != nil || r.Failed() > 0 {
			t.Fatalf("%v, %v", r.String(), err)
		}
		made += r.Done
	}
	load(time.Second)
	within(t, "spans arrive", func() bool { return got.requests.Load() > 0 })
	stop()
	load(away)
	within(t, "the exporter says that it cannot send", func() bool {
		e := p.status().Exports
		return len(e) == 1 && !e[0].Failing.IsZero()
	})
	_, peak := memoryOf(t, p.watcher.PID())
	load(away / 5) // a full queue costs no more
	_, later := memoryOf(t, p.watcher.PID())
	back, _ := p.collector()
	within(t, "the queue drains", func() bool {
		e := p.status().Exports[0]
		return e.Failing.IsZero() && e.Queued == 0 && e.Seen >= uint64(made)
	})
	load(time.Second)
	var e relay.Export
	within(t, "all is accounted for", func() bool {
		e = p.status().Exports[0]
		return e.Queued == 0 && e.Seen >= uint64(made)
	})
	// The connections that found out whether the Service is ready count too.
	if e.Seen != e.Sent+e.Dropped+e.Unsampled+e.Failed || e.Failed != 0 || back.requests.Load() == 0 {
		t.Errorf("not all accounted for: %+v", e)
	}
	if more := later - peak; more > 32<<20 {
		t.Errorf("%d MB more for a queue that was full already", more>>20)
	}
	flows := f.await(made)
	if n := len(flows); n < made {
		t.Errorf("%d connections were made, %d shown", made, n)
	}
	t.Logf("away for %v: %d connections, %d sent, %d dropped; at most %d MB", away, e.Seen, e.Sent, e.Dropped, later>>20)
}

// within waits for a condition, on a busy machine for long.
func within(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

package prom

import (
	"runtime"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/kptrace/kptrace/proxy"
)

// Exporter holds the metrics of one node.
type Exporter struct {
	cfg      Config
	registry *prometheus.Registry
	sync     syncMetrics
	probes   *prometheus.CounterVec
	lives    *prometheus.CounterVec
	flows    *flows
	arenas   arenas
	slis     *sliMetrics

	mu       sync.Mutex
	asked    *proxy.Snapshot // the newest that was asked for
	good     *proxy.View     // the newest the kernel took as a whole
	last     proxy.Report    // of the newest sync that wrote
	triggers map[string]proxy.Trigger
	services uint64 // changes so far
	slices   uint64
	counted  *proxy.View // the View that the next two were made of
	noLocal  map[policyFamily]int
	rules    map[proxy.Table]int
}

// New returns an Exporter that nobody has scraped.
func New(cfg Config) *Exporter {
	e := &Exporter{cfg: cfg, registry: prometheus.NewRegistry(), sync: newSyncMetrics(cfg.Families), flows: newFlows(cfg), slis: newSLIMetrics(cfg.Started)}
	e.probes = newCounter("proxy_healthz_total", "Cumulative proxy healthz HTTP status", "code")
	e.lives = newCounter("proxy_livez_total", "Cumulative proxy livez HTTP status", "code")
	for _, code := range []string{"200", "503"} {
		e.probes.WithLabelValues(code)
		e.lives.WithLabelValues(code)
	}
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "kptrace_build_info", Help: "Always 1; the labels say what was built with what.",
	}, []string{"version", "go_version"})
	build.WithLabelValues(cfg.Version, runtime.Version()).Set(1)
	e.registry.MustRegister(build, nodeState{e},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	if !cfg.Beside {
		e.registry.MustRegister(e.probes, e.lives, e.fallback(), state{e})
		e.registry.MustRegister(e.sync.all()...)
	}
	return e
}

// fallback says whether the mode in use is another than the wanted one.
func (e *Exporter) fallback() prometheus.Collector {
	v := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "kptrace_proxy_mode_fallback",
		Help: "1 if the proxy runs in another mode than the wanted one because that cannot run here, else 0.",
	}, []string{"wanted", "mode"})
	wanted := e.cfg.Wanted
	if wanted == "" {
		wanted = e.cfg.Mode
	}
	g := v.WithLabelValues(string(wanted), string(e.cfg.Mode))
	if wanted != e.cfg.Mode {
		g.Set(1)
	}
	return v
}

// Asked notes that snap is now what is wanted. Call it for each Snapshot, in
// their order.
func (e *Exporter) Asked(snap *proxy.Snapshot) {
	e.mu.Lock()
	before := e.asked
	e.mu.Unlock()
	services, endpoints := changes(before, snap)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked = snap
	e.services += uint64(services)
	e.slices += uint64(endpoints)
}

// Healthz and Livez note the code that a probe was answered with.
func (e *Exporter) Healthz(code int) { e.probes.WithLabelValues(codeText(code)).Inc() }

// Livez is to /livez what Healthz is to /healthz.
func (e *Exporter) Livez(code int) { e.lives.WithLabelValues(codeText(code)).Inc() }

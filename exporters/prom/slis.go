package prom

import (
	"fmt"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// sliMetrics are what Kubernetes components serve at /metrics/slis (KEP-3466),
// by its names, types and labels.
type sliMetrics struct {
	registry *prometheus.Registry
	now      *prometheus.GaugeVec
	total    *prometheus.CounterVec
}

func newSLIMetrics(started time.Time) *sliMetrics {
	s := &sliMetrics{
		registry: prometheus.NewRegistry(),
		now: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "kubernetes_healthcheck", Help: "[STABLE] This metric records the result of a single healthcheck.",
		}, []string{"name", "type"}),
		total: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kubernetes_healthchecks_total", Help: "[STABLE] This metric records the results of all healthcheck.",
		}, []string{"name", "type", "status"}),
	}
	s.registry.MustRegister(s.now, s.total, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "process_start_time_seconds", Help: "[ALPHA] Start time of the process since unix epoch in seconds.",
	}, func() float64 { return float64(started.UnixNano()) / 1e9 }))
	return s
}

// Checked notes the outcome of a health check: its name, as "ping", and the kind
// of the endpoint, as "healthz".
func (e *Exporter) Checked(name, kind string, ok bool) {
	value, status := 0.0, "error"
	if ok {
		value, status = 1, "success"
	}
	e.slis.now.WithLabelValues(name, kind).Set(value)
	e.slis.total.WithLabelValues(name, kind, status).Inc()
}

// SLIs serves /metrics/slis. DELETE resets it, as in other components.
func (e *Exporter) SLIs() http.Handler {
	serve := promhttp.HandlerFor(e.slis.registry, promhttp.HandlerOpts{EnableOpenMetrics: true})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodDelete {
			serve.ServeHTTP(w, r)
			return
		}
		e.slis.now.Reset()
		e.slis.total.Reset()
		fmt.Fprintln(w, "metrics reset")
	})
}

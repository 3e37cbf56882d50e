package prom

import (
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kptrace/kptrace/proxy"
)

const (
	subsystem = "kubeproxy"
	family    = "ip_family"
	// alpha begins the help of everything that is as stable as kube-proxy says.
	alpha = "[ALPHA] "
)

func codeText(code int) string { return strconv.Itoa(code) }

func newCounter(name, help string, labels ...string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Subsystem: subsystem, Name: name, Help: alpha + help}, labels)
}

func newHistogram(name, help string, buckets []float64) *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Subsystem: subsystem, Name: name, Help: alpha + help, Buckets: buckets,
	}, []string{family})
}

// syncMetrics are the metrics that grow with each sync.
type syncMetrics struct {
	duration, full, partial, programming, conntrack *prometheus.HistogramVec

	restoreFailures, partialFailures, deleted *prometheus.CounterVec
	// nftables and cleanup belong to a mode that is not ours; they are there,
	// at zero, so that dashboards made for every mode find them.
	nftables, cleanup *prometheus.CounterVec
}

// newSyncMetrics has all metrics present at zero for each family.
func newSyncMetrics(families []string) syncMetrics {
	short := prometheus.ExponentialBuckets(0.001, 2, 15)
	m := syncMetrics{
		duration:        newHistogram("sync_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds", short),
		full:            newHistogram("sync_full_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds for full resyncs", short),
		partial:         newHistogram("sync_partial_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds for partial resyncs", short),
		programming:     newHistogram("network_programming_duration_seconds", "In Cluster Network Programming Latency in seconds", programmingBuckets()),
		conntrack:       newHistogram("conntrack_reconciler_sync_duration_seconds", "ReconcileConntrackFlowsLatency latency in seconds", short),
		restoreFailures: newCounter("sync_proxy_rules_iptables_restore_failures_total", "Cumulative proxy iptables restore failures", family),
		partialFailures: newCounter("sync_proxy_rules_iptables_partial_restore_failures_total", "Cumulative proxy iptables partial restore failures", family),
		deleted:         newCounter("conntrack_reconciler_deleted_entries_total", "Cumulative conntrack flows deleted by conntrack reconciler", family),
		nftables:        newCounter("sync_proxy_rules_nftables_sync_failures_total", "Cumulative proxy nftables sync failures", family),
		cleanup:         newCounter("sync_proxy_rules_nftables_cleanup_failures_total", "Cumulative proxy nftables cleanup failures", family),
	}
	for _, f := range families {
		for _, h := range m.histograms() {
			h.WithLabelValues(f)
		}
		for _, c := range m.counters() {
			c.WithLabelValues(f)
		}
	}
	return m
}

func (m *syncMetrics) histograms() []*prometheus.HistogramVec {
	return []*prometheus.HistogramVec{m.duration, m.full, m.partial, m.programming, m.conntrack}
}

func (m *syncMetrics) counters() []*prometheus.CounterVec {
	return []*prometheus.CounterVec{m.restoreFailures, m.partialFailures, m.deleted, m.nftables, m.cleanup}
}

func (m *syncMetrics) all() []prometheus.Collector {
	var all []prometheus.Collector
	for _, h := range m.histograms() {
		all = append(all, h)
	}
	for _, c := range m.counters() {
		all = append(all, c)
	}
	return all
}

// programmingBuckets are 0.25 and 0.5, 1 to 59 by 1, 60 to 115 by 5 and 120 to
// 300 by 30.
func programmingBuckets() []float64 {
	return slices.Concat(prometheus.LinearBuckets(0.25, 0.25, 2), prometheus.LinearBuckets(1, 1, 59),
		prometheus.LinearBuckets(60, 5, 12), prometheus.LinearBuckets(120, 30, 7))
}

// Observe notes one sync, as a SyncerConfig's Observe. Every sync that failed
// counts as a restore that failed, whatever stood in its way.
func (e *Exporter) Observe(v *proxy.View, r proxy.Report) {
	took := v.Done.Sub(v.From).Seconds()
	for _, f := range e.cfg.Families {
		e.sync.duration.WithLabelValues(f).Observe(took)
		if r.Full {
			e.sync.full.WithLabelValues(f).Observe(took)
		} else {
			e.sync.partial.WithLabelValues(f).Observe(took)
		}
		if v.Err != nil {
			e.sync.restoreFailures.WithLabelValues(f).Inc()
			if !r.Full {
				e.sync.partialFailures.WithLabelValues(f).Inc()
			}
		}
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.last = r
	if v.Err != nil {
		return
	}
	e.good = v
	for name, t := range v.Snapshot.Triggers {
		if old, ok := e.triggers[name]; ok && old.At.Equal(t.At) || t.At.Before(e.cfg.Started) {
			continue
		}
		f := IPv4
		if t.IP6 {
			f = IPv6
		}
		e.sync.programming.WithLabelValues(f).Observe(max(0, v.Done.Sub(t.At).Seconds()))
	}
	e.triggers = v.Snapshot.Triggers
}

// Conntrack notes one run of the reconciler of stale UDP entries in a family.
func (e *Exporter) Conntrack(family string, took time.Duration, deleted int) {
	e.sync.conntrack.WithLabelValues(family).Observe(took.Seconds())
	e.sync.deleted.WithLabelValues(family).Add(float64(deleted))
}

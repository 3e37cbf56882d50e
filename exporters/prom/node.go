package prom

import (
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// Tracer is what the tracer of a node has done.
type Tracer struct {
	Sources []Source
	// Losses is everything lost so far, by source and place.
	Losses []trace.Loss
	// Queue is how many batches wait for the correlator, of QueueLimit.
	Queue, QueueLimit int
	// Correlating is the time spent on joining events, up to now.
	Correlating time.Duration
	// Updates counts what the correlator emitted, Flows the connections they
	// are of, Evicted those that made room in the flow table before their end.
	Updates, Flows, Evicted uint64
	// Open and Ended are the connections in the table, of Limit.
	Open, Ended, Limit int
	Restarts           uint64
	// Ring and History say what is kept for followers.
	Ring    trace.RingStats
	History trace.HistoryStats
}

// Source is one of a tracer's sources.
type Source struct {
	trace.SourceStats
	// Decoding is the time spent on making events of what was read.
	Decoding time.Duration
}

// RecentList is the list of clients that xt_recent keeps for an endpoint.
type RecentList struct {
	Service  proxy.PortName
	Endpoint netip.AddrPort
	// Entries is how many clients it holds; the oldest goes where there is no
	// room, of Limit.
	Entries, Limit int
}

// Finding is what a check found, with how often.
type Finding struct {
	Code, Severity string
	Count          int
}

// Counter is one metric of another exporter. Its name begins with kptrace_.
type Counter struct {
	Name, Help string
	// Labels are names and values in turn.
	Labels []string
	Value  float64
	// Gauge says that it may fall.
	Gauge bool
}

// nodeState makes, at each scrape, the metrics of one node that are plain
// state.
type nodeState struct{ *Exporter }

// Describe sends nothing: which metrics there are depends on what runs.
func (nodeState) Describe(chan<- *prometheus.Desc) {}

// Collect sends what holds at this moment.
func (n nodeState) Collect(ch chan<- prometheus.Metric) {
	s := sender{ch, map[string]string{}}
	n.collectConntrack(s)
	if n.cfg.Tracer != nil {
		collectTracer(s, n.cfg.Tracer())
	}
	if n.cfg.Drift != nil {
		d := n.cfg.Drift()
		s.counter("kptrace_proxy_drift_total", "Times at which others had changed our rules (certain), or may have (doubt), by what was seen.", float64(d.Certain), "kind", "certain")
		s.counter("kptrace_proxy_drift_total", "", float64(d.Doubts), "kind", "doubt")
	}
	if n.cfg.Sync != nil {
		late := 0.0
		if since := n.cfg.Sync().PendingSince; !since.IsZero() {
			late = time.Since(since).Seconds()
		}
		s.gauge("kptrace_proxy_sync_lag_seconds", "How long the oldest change that is not in the kernel has been waited for, 0 if all are.", late)
	}
	if n.cfg.View != nil {
		n.collectView(s, n.cfg.View())
	}
	if n.cfg.Recent != nil {
		for _, l := range n.cfg.Recent() {
			labels := append(serviceLabels(l.Service), "endpoint", l.Endpoint.String())
			s.gauge("kptrace_affinity_list_entries", "Clients in the list that xt_recent keeps for an endpoint.", float64(l.Entries), labels...)
			s.gauge("kptrace_affinity_list_limit", "Clients that there is room for; the oldest is forgotten where there is none (ip_list_tot of xt_recent).", float64(l.Limit), labels...)
		}
	}
	if n.cfg.IPVS != nil {
		for _, v := range n.cfg.IPVS() {
			collectVirtual(s, &v)
		}
	}
	if n.cfg.EndpointHealth != nil {
		if h, ok := n.cfg.EndpointHealth(); ok {
			collectEndpointHealth(s, h)
		}
	}
	if n.cfg.Findings != nil {
		for _, f := range n.cfg.Findings() {
			s.gauge("kptrace_check_findings", "What the last check of the kernel against the desired state found, by code.", float64(f.Count), "code", f.Code, "severity", f.Severity)
		}
	}
	for _, counters := range n.cfg.Counters {
		for _, c := range counters() {
			if c.Gauge {
				s.gauge(c.Name, c.Help, c.Value, c.Labels...)
			} else {
				s.counter(c.Name, c.Help, c.Value, c.Labels...)
			}
		}
	}
	n.collectSelf(s)
}

func (n nodeState) collectConntrack(s sender) {
	if n.cfg.Conntrack == nil {
		return
	}
	ct, err := n.cfg.Conntrack()
	if err != nil {
		s.ch <- prometheus.NewInvalidMetric(prometheus.NewDesc("kptrace_conntrack_entries", "unreadable", nil, nil), err)
		return
	}
	s.gauge("kptrace_conntrack_entries", "Entries in the connection tracking table of this network namespace.", float64(ct.Entries))
	s.gauge("kptrace_conntrack_entries_limit", "Entries that there may be (nf_conntrack_max).", float64(ct.Limit))
	s.counter("kptrace_conntrack_insert_failed_total", "Entries lost to a race between first packets of one connection.", float64(ct.InsertFailed))
	s.counter("kptrace_conntrack_drops_total", "Packets dropped because the table was full.", float64(ct.Drop))
	s.counter("kptrace_conntrack_early_drops_total", "Entries thrown out of a full table to make room.", float64(ct.EarlyDrop))
	s.counter("kptrace_conntrack_invalid_total", "Packets that fit no entry and could not make one.", float64(ct.Invalid))
	s.counter("kptrace_conntrack_clash_resolved_total", "Races between first packets of one connection that ended well.", float64(ct.ClashResolve))
}

func collectTracer(s sender, t Tracer) {
	for _, src := range t.Sources {
		name := src.Source.String()
		s.counter("kptrace_source_frames_total", "Reads from a kernel stream.", float64(src.Frames), "source", name)
		s.counter("kptrace_source_bytes_total", "Bytes read from a kernel stream.", float64(src.Bytes), "source", name)
		s.counter("kptrace_source_events_total", "Events read from a kernel stream.", float64(src.Events), "source", name)
		s.counter("kptrace_source_overruns_total", "Times at which the kernel had no room for more events of a stream.", float64(src.Overruns), "source", name)
		s.counter("kptrace_source_foreign_events_total", "Events that are not ours.", float64(src.Foreign), "source", name)
		s.counter("kptrace_source_damaged_events_total", "Events that could not be decoded.", float64(src.Damaged), "source", name)
		s.counter("kptrace_source_decode_seconds_total", "Time spent on decoding.", secondsOf(src.Decoding), "source", name)
		s.gauge("kptrace_source_receive_buffer_bytes", "Buffer of the stream's socket.", float64(src.ReceiveBuffer), "source", name)
		// A source that lost nothing has its series, too.
		lost := map[string]float64{"kernel": 0, "queue": 0}
		for _, l := range t.Losses {
			if l.Source == src.Source {
				lost[l.Where] += float64(l.Events)
			}
		}
		for where, v := range lost {
			s.counter("kptrace_lost_events_total", "Events known to be missed: in the kernel, in the queue to the correlator, or (each time counted as one) while others had removed the rules that report.", v, "source", name, "where", where)
		}
	}
	s.gauge("kptrace_queue_batches", "Batches of events that wait for the correlator.", float64(t.Queue))
	s.gauge("kptrace_queue_batches_limit", "Batches that there is room for.", float64(t.QueueLimit))
	s.counter("kptrace_correlator_seconds_total", "Time spent on joining events to connections.", secondsOf(t.Correlating))
	s.counter("kptrace_correlator_updates_total", "Updates of connections that the correlator gave out.", float64(t.Updates))
	s.counter("kptrace_correlator_connections_total", "Connections that the correlator has shown.", float64(t.Flows))
	s.counter("kptrace_correlator_evicted_total", "Connections that left the full flow table before their end was seen.", float64(t.Evicted))
	s.gauge("kptrace_correlator_table_entries", "Connections in the flow table.", float64(t.Open), "state", "open")
	s.gauge("kptrace_correlator_table_entries", "", float64(t.Ended), "state", "ended")
	s.gauge("kptrace_correlator_table_limit", "Connections that the flow table has room for.", float64(t.Limit))
	s.counter("kptrace_tracer_restarts_total", "Times at which the tracer failed and started again.", float64(t.Restarts))
	s.gauge("kptrace_followers", "Readers of the stream of connections, the exporters among them.", float64(t.Ring.Readers))
	s.gauge("kptrace_history_connections", "Connections kept to be looked at later.", float64(t.History.Failures), "kind", "failed")
	s.gauge("kptrace_history_connections", "", float64(t.History.Successes), "kind", "other")
}

func (n nodeState) collectView(s sender, v *proxy.View) {
	if v == nil {
		return
	}
	rules := 0
	problems := 0
	if v.Program != nil {
		rules = len(v.Program.Index())
		problems = len(v.Program.Problems())
	}
	if v.Snapshot != nil {
		problems += len(v.Snapshot.Problems)
		s.gauge("kptrace_proxy_service_ports", "Service ports that the proxy programs, IPv4 and IPv6 apart.", float64(len(v.Snapshot.Services)))
	}
	s.gauge("kptrace_proxy_tagged_rules", "Rules that report what they decide.", float64(rules))
	s.gauge("kptrace_proxy_problems", "Objects that could not be used as they are; kptrace status lists them.", float64(problems))
}

func collectVirtual(s sender, v *trace.VirtualServer) {
	service := append(serviceLabels(v.Service), "address", v.Addr.String())
	s.gauge("kptrace_ipvs_virtual_server_info", "Always 1: a virtual server of IPVS and its scheduler.", 1, with2(service, "scheduler", v.Scheduler)...)
	s.gauge("kptrace_ipvs_persistence_seconds", "How long a virtual server remembers a client, 0 if it does not.", v.Persistence.Seconds(), service...)
	for i := range v.Servers {
		r := &v.Servers[i]
		labels := with2(service, "endpoint", r.Addr.String())
		s.gauge("kptrace_ipvs_weight", "Weight of a real server.", float64(r.Weight), labels...)
		s.gauge("kptrace_ipvs_active_connections", "Connections of a real server in state ESTABLISHED.", float64(r.Active), labels...)
		s.gauge("kptrace_ipvs_inactive_connections", "Connections of a real server in another state.", float64(r.Inactive), labels...)
		s.counter("kptrace_ipvs_connections_total", "Connections scheduled to a real server.", float64(r.Total.Connections), labels...)
		for _, d := range []struct {
			direction      string
			packets, bytes uint64
		}{{"out", r.Total.PacketsIn, r.Total.BytesIn}, {"in", r.Total.PacketsOut, r.Total.BytesOut}} {
			s.counter("kptrace_ipvs_packets_total", "Packets out to a real server and in from it, by IPVS' account.", float64(d.packets), with2(labels, "direction", d.direction)...)
			s.counter("kptrace_ipvs_bytes_total", "Bytes out to a real server and in from it, by IPVS' account.", float64(d.bytes), with2(labels, "direction", d.direction)...)
		}
	}
}

// with2 returns labels and one more, leaving labels as they are.
func with2(labels []string, name, value string) []string {
	return append(labels[:len(labels):len(labels)], name, value)
}

// collectSelf tells what these metrics cost, and what they leave out.
func (n nodeState) collectSelf(s sender) {
	f := n.flows
	f.mu.Lock()
	updates, lost, folded, dropped := f.updates, f.lost, f.folded, f.dropped
	took, scraping, scrapes := f.took, f.scraping, f.scrapes
	series, conns := f.series, len(f.conns)
	f.mu.Unlock()
	s.counter("kptrace_metrics_updates_total", "Updates of connections that went into these metrics.", float64(updates))
	s.counter("kptrace_metrics_lost_updates_total", "Updates that were overrun before they could.", float64(lost))
	s.counter("kptrace_metrics_folded_updates_total", "Updates counted under other as there are too many Services or endpoints.", float64(folded))
	s.counter("kptrace_metrics_dropped_endpoints_total", "Endpoints whose series were dropped after they had left their Service.", float64(dropped))
	s.counter("kptrace_metrics_count_seconds_total", "Time spent on counting connections.", secondsOf(took))
	s.counter("kptrace_metrics_scrape_seconds_total", "Time spent on answering scrapes.", secondsOf(scraping))
	s.counter("kptrace_metrics_scrapes_total", "Scrapes that were answered.", float64(scrapes))
	s.gauge("kptrace_metrics_series", "Series about connections in this answer, each histogram as one.", float64(series))
	s.gauge("kptrace_metrics_tracked_connections", "Connections remembered to count each thing once.", float64(conns))
}

func serviceLabels(n proxy.PortName) []string {
	return []string{"namespace", n.Namespace, "service", n.Name, "port", n.Port, "protocol", n.Proto.String()}
}

// sender makes metrics of values. The help of a family is said once.
type sender struct {
	ch   chan<- prometheus.Metric
	help map[string]string
}

func (s sender) gauge(name, help string, v float64, labels ...string) {
	s.send(prometheus.GaugeValue, name, help, v, labels)
}

func (s sender) counter(name, help string, v float64, labels ...string) {
	s.send(prometheus.CounterValue, name, help, v, labels)
}

func (s sender) send(kind prometheus.ValueType, name, help string, v float64, labels []string) {
	names, values := make([]string, 0, len(labels)/2), make([]string, 0, len(labels)/2)
	for i := 0; i+1 < len(labels); i += 2 {
		names, values = append(names, labels[i]), append(values, labels[i+1])
	}
	if help == "" {
		help = s.help[name]
	} else {
		s.help[name] = help
	}
	desc := prometheus.NewDesc(name, help, names, nil)
	m, err := prometheus.NewConstMetric(desc, kind, v, values...)
	if err != nil {
		m = prometheus.NewInvalidMetric(desc, err)
	}
	s.ch <- m
}

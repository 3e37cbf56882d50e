package main

import "github.com/grafana/grafana-foundation-sdk/go/units"

const on = "{" + byNode + "}"

// node is about the proxy and the tables of nodes.
func node() *board {
	b := newBoard("node", "kptrace / Node and proxy", "Whether nodes follow the cluster: syncs, programming latency, rules, drift, connection tracking; and what kptrace itself needs.", false, false)
	b.stat("Sync lag", "How long the oldest change has waited to be programmed.", units.Seconds, 5, 60,
		`max(kptrace_proxy_sync_lag_seconds`+on+`)`)
	b.stat("Failed syncs", "Syncs that could not program everything, in the last hour.", units.Short, 1, 10,
		`sum(increase(kubeproxy_sync_proxy_rules_iptables_restore_failures_total`+on+`[1h]))`)
	b.stat("Drift", "Changes of our rules by others, in the last hour.", units.Short, 1, 10,
		`sum(increase(kptrace_proxy_drift_total{`+byNode+`, kind="certain"}[1h]))`)
	b.stat("Conntrack use", "The fullest table.", units.PercentUnit, 0.7, 0.9,
		`max(kptrace_conntrack_entries`+on+` / kptrace_conntrack_entries_limit`+on+`)`)
	b.stat("Problems", "Objects that could not be used as they are; kptrace status lists them.", units.Short, 1, 10,
		`sum(kptrace_proxy_problems`+on+`)`)
	b.stat("Service ports", "Programmed on the node with the most.", units.Short, 0, 0,
		`max(kptrace_proxy_service_ports`+on+`)`)
	b.row("Syncs")
	b.lines("Sync duration", "p50 and p99.", units.Seconds,
		query{`histogram_quantile(0.5, sum by (le, instance) (rate(kubeproxy_sync_proxy_rules_duration_seconds_bucket` + on + `[$__rate_interval])))`, "{{instance}} p50"},
		query{`histogram_quantile(0.99, sum by (le, instance) (rate(kubeproxy_sync_proxy_rules_duration_seconds_bucket` + on + `[$__rate_interval])))`, "{{instance}} p99"})
	b.lines("Programming latency", "From a change of endpoints in the API to the kernel, p99.", units.Seconds,
		query{`histogram_quantile(0.99, sum by (le, instance) (rate(kubeproxy_network_programming_duration_seconds_bucket` + on + `[$__rate_interval])))`, "{{instance}} p99"})
	b.lines("Syncs", "Full ones compare everything, partial ones write what changed.", units.CountsPerSecond,
		query{`sum by (instance) (rate(kubeproxy_sync_full_proxy_rules_duration_seconds_count` + on + `[$__rate_interval]))`, "{{instance}} full"},
		query{`sum by (instance) (rate(kubeproxy_sync_partial_proxy_rules_duration_seconds_count` + on + `[$__rate_interval]))`, "{{instance}} partial"})
	b.lines("Sync lag", "0 as long as the kernel has everything that is wanted.", units.Seconds,
		query{`kptrace_proxy_sync_lag_seconds` + on, "{{instance}}"})
	b.row("Rules")
	b.lines("Rules", "In the kernel, by table (iptables mode).", units.Short,
		query{`sum by (instance, table) (kubeproxy_sync_proxy_rules_iptables_total` + on + `)`, "{{instance}} {{table}}"})
	b.lines("Drift", "Changes of our rules by others, and suspicions that were looked into.", units.CountsPerSecond,
		query{`sum by (instance, kind) (rate(kptrace_proxy_drift_total` + on + `[$__rate_interval]))`, "{{instance}} {{kind}}"})
	b.lines("Findings", "What kptrace check found in the kernel, by code.", units.Short,
		query{`sum by (instance, code, severity) (kptrace_check_findings` + on + `)`, "{{instance}} {{severity}} {{code}}"})
	b.lines("Objects with problems", "They are used as far as they can be.", units.Short,
		query{`kptrace_proxy_problems` + on, "{{instance}}"})
	b.row("Connection tracking")
	b.lines("Entries", "In the table, of how many there may be.", units.Short,
		query{`kptrace_conntrack_entries` + on, "{{instance}} entries"},
		query{`kptrace_conntrack_entries_limit` + on, "{{instance}} limit"})
	b.lines("Losses", "Packets dropped by a full table, entries thrown out of it, and races that an entry lost.", units.CountsPerSecond,
		query{`rate(kptrace_conntrack_drops_total` + on + `[$__rate_interval])`, "{{instance}} drops"},
		query{`rate(kptrace_conntrack_early_drops_total` + on + `[$__rate_interval])`, "{{instance}} early drops"},
		query{`rate(kptrace_conntrack_insert_failed_total` + on + `[$__rate_interval])`, "{{instance}} insert failed"},
		query{`rate(kptrace_conntrack_invalid_total` + on + `[$__rate_interval])`, "{{instance}} invalid"})
	b.lines("Reconciler", "UDP entries deleted so that clients move on to new endpoints.", units.CountsPerSecond,
		query{`sum by (instance) (rate(kubeproxy_conntrack_reconciler_deleted_entries_total` + on + `[$__rate_interval]))`, "{{instance}}"})
	b.lines("Probes", "Answers of /healthz and /livez, by code.", units.CountsPerSecond,
		query{`sum by (instance, code) (rate(kubeproxy_proxy_healthz_total` + on + `[$__rate_interval]))`, "{{instance}} healthz {{code}}"},
		query{`sum by (instance, code) (rate(kubeproxy_proxy_livez_total` + on + `[$__rate_interval]))`, "{{instance}} livez {{code}}"})
	b.row("Own cost")
	b.lines("CPU", "Of the whole process, in processors.", units.Short,
		query{`rate(process_cpu_seconds_total` + on + `[$__rate_interval])`, "{{instance}}"})
	b.lines("Memory", "Resident, of the whole process.", units.BytesIEC,
		query{`process_resident_memory_bytes` + on, "{{instance}}"})
	return b
}

// health is about what kptrace sees, what it misses, and what that costs.
func health() *board {
	b := newBoard("health", "kptrace / Health", "What kptrace sees and what it misses: events, losses, queues, tables, and the cost of each part.", false, false)
	b.stat("Nodes", "That are scraped.", units.Short, 0, 0, `count(kptrace_build_info`+on+`)`)
	b.stat("Events", "Read from the kernel, per second.", units.CountsPerSecond, 0, 0,
		`sum(rate(kptrace_source_events_total`+on+`[$__rate_interval]))`)
	b.stat("Lost events", "In the last hour. Connections of such a moment are marked incomplete.", units.Short, 1, 1000,
		`sum(increase(kptrace_lost_events_total`+on+`[1h]))`)
	b.stat("Queue", "Batches waiting for the correlator: the fullest queue.", units.PercentUnit, 0.25, 0.75,
		`max(kptrace_queue_batches`+on+` / kptrace_queue_batches_limit`+on+`)`)
	b.stat("Tracer restarts", "In the last hour. Services are never affected.", units.Short, 1, 3,
		`sum(increase(kptrace_tracer_restarts_total`+on+`[1h]))`)
	b.stat("Uncounted updates", "Updates that these metrics missed or counted as other, in the last hour.", units.Short, 1, 1000,
		`sum(increase(kptrace_metrics_lost_updates_total`+on+`[1h])) + sum(increase(kptrace_metrics_folded_updates_total`+on+`[1h]))`)
	b.row("Sources")
	b.lines("Events", "By kernel stream.", units.CountsPerSecond,
		query{`sum by (instance, source) (rate(kptrace_source_events_total` + on + `[$__rate_interval]))`, "{{instance}} {{source}}"})
	b.lines("Lost events", "By stream and place: in the kernel's buffer, or in the queue to the correlator.", units.CountsPerSecond,
		query{`sum by (instance, source, where) (rate(kptrace_lost_events_total` + on + `[$__rate_interval]))`, "{{instance}} {{source}} {{where}}"})
	b.lines("Foreign and damaged events", "Of others, and unreadable.", units.CountsPerSecond,
		query{`sum by (instance, source) (rate(kptrace_source_foreign_events_total` + on + `[$__rate_interval]))`, "{{instance}} {{source}} foreign"},
		query{`sum by (instance, source) (rate(kptrace_source_damaged_events_total` + on + `[$__rate_interval]))`, "{{instance}} {{source}} damaged"})
	b.lines("Overruns", "Times at which a stream's buffer was full.", units.CountsPerSecond,
		query{`sum by (instance, source) (rate(kptrace_source_overruns_total` + on + `[$__rate_interval]))`, "{{instance}} {{source}}"})
	b.row("Correlator")
	b.lines("Connections and updates", "Shown, and how often something changed about them.", units.CountsPerSecond,
		query{`rate(kptrace_correlator_connections_total` + on + `[$__rate_interval])`, "{{instance}} connections"},
		query{`rate(kptrace_correlator_updates_total` + on + `[$__rate_interval])`, "{{instance}} updates"})
	b.lines("Flow table", "Connections known at once, by state.", units.Short,
		query{`kptrace_correlator_table_entries` + on, "{{instance}} {{state}}"},
		query{`kptrace_correlator_table_limit` + on, "{{instance}} limit"})
	b.lines("Evicted", "Connections that left the full table before their end was seen.", units.CountsPerSecond,
		query{`rate(kptrace_correlator_evicted_total` + on + `[$__rate_interval])`, "{{instance}}"})
	b.lines("Kept and followed", "Connections kept to be looked at later, and readers of the stream.", units.Short,
		query{`kptrace_history_connections` + on, "{{instance}} {{kind}}"},
		query{`kptrace_followers` + on, "{{instance}} readers"})
	b.row("Cost")
	b.lines("CPU by part", "Processor time of decoding, joining, counting and scrapes.", units.Short,
		query{`sum by (instance) (rate(kptrace_source_decode_seconds_total` + on + `[$__rate_interval]))`, "{{instance}} decoding"},
		query{`rate(kptrace_correlator_seconds_total` + on + `[$__rate_interval])`, "{{instance}} joining"},
		query{`rate(kptrace_metrics_count_seconds_total` + on + `[$__rate_interval])`, "{{instance}} counting"},
		query{`rate(kptrace_metrics_scrape_seconds_total` + on + `[$__rate_interval])`, "{{instance}} scrapes"})
	b.lines("CPU", "Of the whole process, in processors.", units.Short,
		query{`rate(process_cpu_seconds_total` + on + `[$__rate_interval])`, "{{instance}}"})
	b.lines("Memory", "Resident, and Go's live heap.", units.BytesIEC,
		query{`process_resident_memory_bytes` + on, "{{instance}} resident"},
		query{`go_memstats_heap_inuse_bytes` + on, "{{instance}} heap"})
	b.lines("Series", "About connections in one scrape, and the mean time that a scrape takes.", units.Short,
		query{`kptrace_metrics_series` + on, "{{instance}} series"})
	b.lines("Time of a scrape", "Mean.", units.Seconds,
		query{`rate(kptrace_metrics_scrape_seconds_total` + on + `[$__rate_interval]) / rate(kptrace_metrics_scrapes_total` + on + `[$__rate_interval])`, "{{instance}}"})
	b.lines("Goroutines", "A steady rise is a leak.", units.Short, query{`go_goroutines` + on, "{{instance}}"})
	return b
}

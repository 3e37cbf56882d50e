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
	b.lines("Failed syncs", "Writes to the kernel that it refused: of everything, and of what changed.", units.CountsPerSecond,
		query{`sum by (instance) (rate(kubeproxy_sync_proxy_rules_iptables_restore_failures_total` + on + `[$__rate_interval]))`, "{{instance}} full"},
		query{`sum by (instance) (rate(kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total` + on + `[$__rate_interval]))`, "{{instance}} partial"})
	b.lines("Time since the last sync", "A node without changes syncs once an hour.", units.Seconds,
		query{`time() - max by (instance) (kubeproxy_sync_proxy_rules_last_timestamp_seconds` + on + `)`, "{{instance}}"})
	b.lines("Changes", "Of Services and endpoints, as they come.", units.CountsPerSecond,
		query{`rate(kubeproxy_sync_proxy_rules_service_changes_total` + on + `[$__rate_interval])`, "{{instance}} Services"},
		query{`rate(kubeproxy_sync_proxy_rules_endpoint_changes_total` + on + `[$__rate_interval])`, "{{instance}} endpoints"})
	b.lines("Changes that wait", "For the next sync.", units.Short,
		query{`kubeproxy_sync_proxy_rules_service_changes_pending` + on, "{{instance}} Services"},
		query{`kubeproxy_sync_proxy_rules_endpoint_changes_pending` + on, "{{instance}} endpoints"})
	b.row("Rules")
	b.lines("Rules", "In the kernel by table, and how many the last sync wrote (iptables mode).", units.Short,
		query{`sum by (instance, table) (kubeproxy_sync_proxy_rules_iptables_total` + on + `)`, "{{instance}} {{table}}"},
		query{`sum by (instance, table) (kubeproxy_sync_proxy_rules_iptables_last` + on + `)`, "{{instance}} {{table}} written"})
	b.lines("Rules that report", "What is seen of connections comes from these.", units.Short,
		query{`kptrace_proxy_tagged_rules` + on, "{{instance}}"})
	b.lines("Drift", "Changes of our rules by others, and suspicions that were looked into.", units.CountsPerSecond,
		query{`sum by (instance, kind) (rate(kptrace_proxy_drift_total` + on + `[$__rate_interval]))`, "{{instance}} {{kind}}"})
	b.lines("Findings", "What kptrace check found in the kernel, by code.", units.Short,
		query{`sum by (instance, code, severity) (kptrace_check_findings` + on + `)`, "{{instance}} {{severity}} {{code}}"})
	b.lines("Objects with problems", "They are used as far as they can be.", units.Short,
		query{`kptrace_proxy_problems` + on, "{{instance}}"})
	b.lines("Services without local endpoints", "With a Local traffic policy: this node drops what comes for them.", units.Short,
		query{`sum by (instance, traffic_policy) (kubeproxy_sync_proxy_rules_no_local_endpoints_total` + on + `)`, "{{instance}} {{traffic_policy}}"})
	b.lines("Other mode than wanted", "1 where the wanted mode cannot run.", units.Short,
		query{`kptrace_proxy_mode_fallback` + on, "{{instance}} {{mode}} in place of {{wanted}}"})
	b.row("Connection tracking")
	b.lines("Entries", "In the table, of how many there may be.", units.Short,
		query{`kptrace_conntrack_entries` + on, "{{instance}} entries"},
		query{`kptrace_conntrack_entries_limit` + on, "{{instance}} limit"})
	b.lines("Losses", "Packets dropped by a full table, entries thrown out of it, and races that an entry lost.", units.CountsPerSecond,
		query{`rate(kptrace_conntrack_drops_total` + on + `[$__rate_interval])`, "{{instance}} drops"},
		query{`rate(kptrace_conntrack_early_drops_total` + on + `[$__rate_interval])`, "{{instance}} early drops"},
		query{`rate(kptrace_conntrack_insert_failed_total` + on + `[$__rate_interval])`, "{{instance}} insert failed"},
		query{`rate(kptrace_conntrack_invalid_total` + on + `[$__rate_interval])`, "{{instance}} invalid"},
		query{`rate(kptrace_conntrack_clash_resolved_total` + on + `[$__rate_interval])`, "{{instance}} races that ended well"})
	b.lines("Reconciler", "UDP entries deleted so that clients move on to new endpoints.", units.CountsPerSecond,
		query{`sum by (instance) (rate(kubeproxy_conntrack_reconciler_deleted_entries_total` + on + `[$__rate_interval]))`, "{{instance}}"})
	b.lines("Time of the reconciler", "p99.", units.Seconds,
		query{`histogram_quantile(0.99, sum by (le, instance) (rate(kubeproxy_conntrack_reconciler_sync_duration_seconds_bucket` + on + `[$__rate_interval])))`, "{{instance}} p99"})
	b.lines("Packets that rules count", "Dropped because connection tracking could not place them, and let through to NodePorts on 127.0.0.1.", units.CountsPerSecond,
		query{`rate(kubeproxy_iptables_ct_state_invalid_dropped_packets_total` + on + `[$__rate_interval])`, "{{instance}} invalid"},
		query{`rate(kubeproxy_iptables_localhost_nodeports_accepted_packets_total` + on + `[$__rate_interval])`, "{{instance}} NodePorts on 127.0.0.1"})
	b.lines("Probes", "Answers of /healthz and /livez, by code.", units.CountsPerSecond,
		query{`sum by (instance, code) (rate(kubeproxy_proxy_healthz_total` + on + `[$__rate_interval]))`, "{{instance}} healthz {{code}}"},
		query{`sum by (instance, code) (rate(kubeproxy_proxy_livez_total` + on + `[$__rate_interval]))`, "{{instance}} livez {{code}}"})
	b.row("Endpoints that do not answer")
	b.lines("Taken out", "Endpoints that get no new connections at the moment (--server-health).", units.Short,
		query{`kptrace_endpoints_out` + on, "{{instance}}"})
	b.lines("Probes", "Connections made to see whether an endpoint answers, by result.", units.CountsPerSecond,
		query{`sum by (instance, result) (rate(kptrace_endpoint_probes_total` + on + `[$__rate_interval]))`, "{{instance}} {{result}}"})
	b.lines("Decisions", "Endpoints taken out, those that stayed as too few others were left, and half-open connections freed to go elsewhere.", units.CountsPerSecond,
		query{`rate(kptrace_endpoint_outs_total` + on + `[$__rate_interval])`, "{{instance}} out"},
		query{`rate(kptrace_endpoint_outs_refused_total` + on + `[$__rate_interval])`, "{{instance}} stayed"},
		query{`rate(kptrace_endpoint_connections_freed_total` + on + `[$__rate_interval])`, "{{instance}} freed"})
	b.lines("Connections that nobody answered", "What was done about them (--reroute-unanswered), and connections with rules of their own at the moment.", units.Short,
		query{`sum by (instance, result) (increase(kptrace_reroute_decisions_total` + on + `[$__rate_interval]))`, "{{instance}} {{result}}"},
		query{`kptrace_reroute_rules` + on, "{{instance}} rules"})
	b.row("Userspace mode")
	b.lines("Relayed", "Connections, UDP clients with a session, and ports at which the proxy listens.", units.Short,
		query{`kptrace_userspace_connections_open` + on, "{{instance}} connections"},
		query{`kptrace_userspace_udp_sessions_open` + on, "{{instance}} UDP sessions"},
		query{`kptrace_userspace_listeners` + on, "{{instance}} ports"})
	b.lines("Accepted and dialled", "By what became of a dial; retried: another endpoint took it; unserved: none did.", units.CountsPerSecond,
		query{`rate(kptrace_userspace_connections_accepted_total` + on + `[$__rate_interval])`, "{{instance}} accepted"},
		query{`rate(kptrace_userspace_udp_sessions_total` + on + `[$__rate_interval])`, "{{instance}} UDP sessions"},
		query{`sum by (instance, outcome) (rate(kptrace_userspace_dials_total` + on + `[$__rate_interval]))`, "{{instance}} dial {{outcome}}"},
		query{`rate(kptrace_userspace_connections_retried_total` + on + `[$__rate_interval])`, "{{instance}} retried"},
		query{`rate(kptrace_userspace_connections_unserved_total` + on + `[$__rate_interval])`, "{{instance}} unserved"})
	b.lines("Descriptors", "In use for connections, sessions and ports, of how many there may be. Who finds none waits.", units.PercentUnit,
		query{`kptrace_userspace_descriptors_in_use` + on + ` / kptrace_userspace_descriptors_limit` + on, "{{instance}}"})
	b.lines("Waits and drops", "For want of descriptors or room, and connections to a port of the proxy that no rule led there.", units.CountsPerSecond,
		query{`rate(kptrace_userspace_descriptor_waits_total` + on + `[$__rate_interval])`, "{{instance}} waits"},
		query{`rate(kptrace_userspace_descriptor_exhausted_total` + on + `[$__rate_interval])`, "{{instance}} refused descriptors"},
		query{`rate(kptrace_userspace_datagrams_dropped_total` + on + `[$__rate_interval])`, "{{instance}} datagrams dropped"},
		query{`rate(kptrace_userspace_direct_connections_total` + on + `[$__rate_interval])`, "{{instance}} direct"})
	b.lines("Relayed traffic", "Payload, out to endpoints and in from them, and datagrams of clients.", units.BytesPerSecondIEC,
		query{`sum by (instance, direction) (rate(kptrace_userspace_bytes_total` + on + `[$__rate_interval]))`, "{{instance}} {{direction}}"},
		query{`rate(kptrace_userspace_datagrams_received_total` + on + `[$__rate_interval])`, "{{instance}} datagrams"})
	b.lines("Affinity", "Clients whose endpoint is remembered, those forgotten for want of room, and those whose endpoint could not be reached.", units.Short,
		query{`kptrace_userspace_affinity_clients` + on, "{{instance}} clients"},
		query{`increase(kptrace_userspace_affinity_evictions_total` + on + `[$__rate_interval])`, "{{instance}} forgotten"},
		query{`increase(kptrace_userspace_affinity_resets_total` + on + `[$__rate_interval])`, "{{instance}} reset"})
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
	b.lines("Bytes", "Read from a stream.", units.BytesPerSecondIEC,
		query{`sum by (instance, source) (rate(kptrace_source_bytes_total` + on + `[$__rate_interval]))`, "{{instance}} {{source}}"})
	b.lines("Events in a read", "Mean. Many in one read are cheap; a stream that cannot keep up has more and more.", units.Short,
		query{`sum by (instance, source) (rate(kptrace_source_events_total` + on + `[$__rate_interval])) / sum by (instance, source) (rate(kptrace_source_frames_total` + on + `[$__rate_interval]))`, "{{instance}} {{source}}"})
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
	b.row("Spans and log records")
	b.lines("Connections", "What became of them, by signal. dropped: the queue was full; failed: refused by the collector, or given up.", units.CountsPerSecond,
		query{`sum by (instance, signal, outcome) (rate(kptrace_otlp_connections_total` + on + `[$__rate_interval]))`, "{{instance}} {{signal}} {{outcome}}"})
	b.lines("Queue", "How full it is.", units.PercentUnit,
		query{`kptrace_otlp_queue_connections` + on + ` / kptrace_otlp_queue_connections_limit` + on, "{{instance}} {{signal}}"})
	b.lines("Cannot send", "For how long nothing could be sent; 0 if all is well.", units.Seconds,
		query{`kptrace_otlp_failing_seconds` + on, "{{instance}} {{signal}}"})
	b.lines("Requests", "Answered well, and tried again.", units.CountsPerSecond,
		query{`sum by (instance, signal) (rate(kptrace_otlp_requests_total` + on + `[$__rate_interval]))`, "{{instance}} {{signal}}"},
		query{`sum by (instance, signal) (rate(kptrace_otlp_retries_total` + on + `[$__rate_interval]))`, "{{instance}} {{signal}} retries"})
	b.lines("Spans and records", "Taken by the collector, those of them that it will not keep, and updates that came too fast to be read.", units.CountsPerSecond,
		query{`sum by (instance, signal) (rate(kptrace_otlp_items_total` + on + `[$__rate_interval]))`, "{{instance}} {{signal}}"},
		query{`sum by (instance, signal) (rate(kptrace_otlp_rejected_items_total` + on + `[$__rate_interval]))`, "{{instance}} {{signal}} rejected"},
		query{`rate(kptrace_otlp_overrun_updates_total` + on + `[$__rate_interval])`, "{{instance}} overrun"})
	b.lines("Requests with a traceparent", "What became of those found in payload (--traceparent).", units.CountsPerSecond,
		query{`sum by (instance, outcome) (rate(kptrace_traceparent_requests_total` + on + `[$__rate_interval]))`, "{{instance}} {{outcome}}"})
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
	b.lines("Series", "About connections in one scrape, connections remembered to count each thing once, and endpoints whose series went with them.", units.Short,
		query{`kptrace_metrics_series` + on, "{{instance}} series"},
		query{`kptrace_metrics_tracked_connections` + on, "{{instance}} connections"},
		query{`increase(kptrace_metrics_dropped_endpoints_total` + on + `[$__rate_interval])`, "{{instance}} endpoints dropped"})
	b.lines("Time of a scrape", "Mean.", units.Seconds,
		query{`rate(kptrace_metrics_scrape_seconds_total` + on + `[$__rate_interval]) / rate(kptrace_metrics_scrapes_total` + on + `[$__rate_interval])`, "{{instance}}"})
	b.lines("Goroutines", "A steady rise is a leak.", units.Short, query{`go_goroutines` + on, "{{instance}}"})
	return b
}

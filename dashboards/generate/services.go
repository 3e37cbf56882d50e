package main

import "github.com/grafana/grafana-foundation-sdk/go/units"

const (
	svc   = "namespace, service, port"
	name  = "{{namespace}}/{{service}}:{{port}}"
	rate  = "[$__rate_interval]"
	where = "{" + byService + "}"
	bad   = `outcome=~"refused|reset|timeout|rejected|dropped"`
)

// services is about all Services at a glance.
func services() *board {
	b := newBoard("services", "kptrace / Services", "What happens to connections to all Services: how many, how many fail and why, how long they take to establish, and whether they are spread as they should be.", true, false)
	b.stat("New connections", "Connections begun, per second.", units.CountsPerSecond, 0, 0,
		`sum(rate(kptrace_connections_started_total`+where+rate+`))`)
	b.stat("Failed", "Share of ended connections that were refused, reset, rejected, dropped or timed out.", units.PercentUnit, 0.01, 0.05,
		`(sum(rate(kptrace_connections_ended_total{`+byService+`, `+bad+`}`+rate+`)) or vector(0)) / sum(rate(kptrace_connections_ended_total`+where+rate+`))`)
	b.stat("Time to establish, p99", "99 of 100 connections are established within this time.", units.Seconds, 0.25, 0.75,
		`histogram_quantile(0.99, sum by (le) (rate(kptrace_connection_establish_seconds_bucket`+where+rate+`)))`)
	b.stat("Unanswered", "Connections without an answer for a second, per second.", units.CountsPerSecond, 0.01, 1,
		`sum(rate(kptrace_connections_unanswered_total`+where+rate+`))`)
	b.stat("Open", "Connections established and not ended.", units.Short, 0, 0,
		`sum(kptrace_connections_open`+where+`)`)
	b.stat("Services without endpoints", "Service ports of which no endpoint is ready.", units.Short, 1, 10,
		`count(sum by (`+svc+`) (kptrace_service_endpoints{`+byService+`, state="ready"}) == 0) or vector(0)`)
	b.row("Connections")
	b.lines("New connections", "By Service port: the ten with the most.", units.CountsPerSecond,
		query{`topk(10, sum by (` + svc + `) (rate(kptrace_connections_started_total` + where + rate + `)))`, name})
	b.lines("Failed connections", "By outcome and reason. no-endpoints: nothing to send it to; endpoint-refused: the pod has no such port open; syn-unanswered: nobody answers.", units.CountsPerSecond,
		query{`sum by (outcome, reason) (rate(kptrace_connections_ended_total{` + byService + `, ` + bad + `}` + rate + `))`, "{{outcome}} {{reason}}"})
	b.lines("Failed connections by Service", "The ten with the most.", units.CountsPerSecond,
		query{`topk(10, sum by (` + svc + `) (rate(kptrace_connections_ended_total{` + byService + `, ` + bad + `}` + rate + `)) > 0)`, name})
	b.lines("Attempts, retransmits", "Attempts at an endpoint that failed, further attempts, and SYNs sent again: what clients feel as slowness before they see errors.", units.CountsPerSecond,
		query{`sum(rate(kptrace_failed_attempts_total` + where + rate + `))`, "failed attempts"},
		query{`sum(rate(kptrace_retries_total` + where + rate + `))`, "retries"},
		query{`sum(rate(kptrace_reroutes_total` + where + rate + `))`, "reroutes"},
		query{`sum(rate(kptrace_syn_retransmits_total` + where + rate + `))`, "SYN retransmits"})
	b.row("Latency")
	b.latency("Time to establish", "From SYN to SYN-ACK, as the node saw them. A step at 1 s is a lost SYN.", "kptrace_connection_establish_seconds", "service")
	b.heat("Time to establish", "How many connections took how long.", "kptrace_connection_establish_seconds")
	b.row("Spread and traffic")
	b.lines("Off the expected share", "How far an endpoint's share of picks is from what the rules should give it: the ten that are farthest off. Chance alone gives some percent with few connections.", units.PercentUnit,
		query{`topk(10, abs(sum by (instance, ` + svc + `, endpoint, pod) (increase(kptrace_picks_total` + where + `[$__range])) / ignoring (endpoint, pod) group_left () sum by (instance, ` + svc + `) (increase(kptrace_picks_total` + where + `[$__range])) - sum by (instance, ` + svc + `, endpoint, pod) (kptrace_expected_share_ratio` + where + `)))`, name + " {{pod}} {{endpoint}}"})
	b.lines("Traffic", "Bytes with their headers, out to endpoints and in from them, as connection tracking counted them.", units.BytesPerSecondIEC,
		query{`sum by (direction) (rate(kptrace_bytes_total` + where + rate + `))`, "{{direction}}"})
	b.table("Services", "A click on a Service leads to its details.", []string{"namespace", "service", "port"},
		map[string]string{"service": "/d/kptrace-service?var-namespace=${__data.fields.namespace}&var-service=${__data.fields.service}&${datasource:queryparam}&${__url_time_range}"},
		column{"New connections", units.CountsPerSecond, `sum by (` + svc + `) (rate(kptrace_connections_started_total` + where + rate + `))`},
		column{"Failed", units.PercentUnit, `sum by (` + svc + `) (rate(kptrace_connections_ended_total{` + byService + `, ` + bad + `}` + rate + `)) / sum by (` + svc + `) (rate(kptrace_connections_ended_total` + where + rate + `))`},
		column{"p99 to establish", units.Seconds, `histogram_quantile(0.99, sum by (le, ` + svc + `) (rate(kptrace_connection_establish_seconds_bucket` + where + rate + `)))`},
		column{"Open", units.Short, `sum by (` + svc + `) (kptrace_connections_open` + where + `)`},
		column{"Ready endpoints", units.Short, `max by (` + svc + `) (kptrace_service_endpoints{` + byService + `, state="ready"})`})
	return b
}

// service is about one Service and its endpoints.
func service() *board {
	const ep, pod = "endpoint, pod", "{{pod}} {{endpoint}}"
	b := newBoard("service", "kptrace / Service detail", "One Service and its endpoints: who got how much of it, what went wrong where, affinity, scheduler, retries and resets.", true, true)
	b.table("Endpoints", "What each endpoint got, and what became of it.", []string{"pod", "endpoint"}, nil,
		column{"New connections", units.CountsPerSecond, `sum by (` + ep + `) (rate(kptrace_connections_started_total{` + byService + `, endpoint!=""}` + rate + `))`},
		column{"Share", units.PercentUnit, `sum by (` + ep + `) (rate(kptrace_picks_total` + where + rate + `)) / ignoring (endpoint, pod) group_left () sum(rate(kptrace_picks_total` + where + rate + `))`},
		column{"Expected share", units.PercentUnit, `avg by (` + ep + `) (kptrace_expected_share_ratio` + where + `)`},
		column{"Failed attempts", units.CountsPerSecond, `sum by (` + ep + `) (rate(kptrace_failed_attempts_total` + where + rate + `))`},
		column{"Mean to establish", units.Seconds, `sum by (` + ep + `) (rate(kptrace_endpoint_establish_seconds_sum` + where + rate + `)) / sum by (` + ep + `) (rate(kptrace_endpoint_establish_seconds_count` + where + rate + `))`},
		column{"Open", units.Short, `sum by (` + ep + `) (kptrace_connections_open` + where + `)`})
	b.row("Connections")
	b.lines("New connections", "By endpoint; without one where there was none to pick.", units.CountsPerSecond,
		query{`sum by (` + ep + `) (rate(kptrace_connections_started_total` + where + rate + `))`, pod})
	b.lines("Failed connections", "By outcome, reason and endpoint.", units.CountsPerSecond,
		query{`sum by (outcome, reason, ` + ep + `) (rate(kptrace_connections_ended_total{` + byService + `, ` + bad + `}` + rate + `))`, "{{outcome}} {{reason}} " + pod})
	b.lines("Share of picks", "Solid is what an endpoint got, the other what the rules should give it. Connections that affinity decides are left aside.", units.PercentUnit,
		query{`sum by (` + ep + `) (rate(kptrace_picks_total` + where + rate + `)) / ignoring (endpoint, pod) group_left () sum(rate(kptrace_picks_total` + where + rate + `))`, pod},
		query{`avg by (` + ep + `) (kptrace_expected_share_ratio` + where + `)`, "expected " + pod})
	b.lines("Open connections", "By endpoint.", units.Short,
		query{`sum by (` + ep + `) (kptrace_connections_open` + where + `)`, pod})
	b.row("Latency")
	b.latency("Time to establish", "Dots are connections whose trace is kept: click one to see it.", "kptrace_connection_establish_seconds", "port")
	b.lines("Mean time to establish", "By endpoint: one that is slow stands out.", units.Seconds,
		query{`sum by (` + ep + `) (rate(kptrace_endpoint_establish_seconds_sum` + where + rate + `)) / sum by (` + ep + `) (rate(kptrace_endpoint_establish_seconds_count` + where + rate + `))`, pod})
	b.latency("Duration", "From the first packet to the first FIN or RST.", "kptrace_connection_duration_seconds", "port")
	b.heat("Duration", "How many connections lasted how long.", "kptrace_connection_duration_seconds")
	b.row("Affinity and scheduler")
	b.lines("Affinity decisions", "hit: the client went where it was before; new: it was not known; expired, evicted: it had been; reset: its endpoint is gone. Empty without session affinity.", units.CountsPerSecond,
		query{`sum by (decision) (rate(kptrace_affinity_decisions_total` + where + rate + `))`, "{{decision}}"})
	b.lines("Affinity lists", "How full the kernel's list of clients is, by endpoint (iptables mode). A full list forgets the oldest client.", units.PercentUnit,
		query{`max by (instance, endpoint) (kptrace_affinity_list_entries` + where + ` / kptrace_affinity_list_limit` + where + `)`, "{{instance}} {{endpoint}}"})
	b.lines("IPVS weight", "By scheduler and endpoint (IPVS mode).", units.Short,
		query{`avg by (scheduler, endpoint) (kptrace_ipvs_weight` + where + ` * on (instance, address, protocol) group_left (scheduler) kptrace_ipvs_virtual_server_info` + where + `)`, "{{scheduler}} {{endpoint}}"})
	b.lines("IPVS connections", "As IPVS itself counts them (IPVS mode).", units.Short,
		query{`sum by (endpoint) (kptrace_ipvs_active_connections` + where + `)`, "active {{endpoint}}"},
		query{`sum by (endpoint) (kptrace_ipvs_inactive_connections` + where + `)`, "inactive {{endpoint}}"})
	b.lines("IPVS schedules", "New connections that IPVS gave to an endpoint (IPVS mode).", units.CountsPerSecond,
		query{`sum by (endpoint) (rate(kptrace_ipvs_connections_total` + where + rate + `))`, "{{endpoint}}"})
	b.lines("IPVS persistence", "How long a virtual server remembers a client, 0 if it does not (IPVS mode).", units.Seconds,
		query{`max by (port, address) (kptrace_ipvs_persistence_seconds` + where + `)`, "{{port}} {{address}}"})
	b.row("What goes wrong")
	b.lines("Failed attempts", "By endpoint and outcome.", units.CountsPerSecond,
		query{`sum by (outcome, ` + ep + `) (rate(kptrace_failed_attempts_total` + where + rate + `))`, "{{outcome}} " + pod})
	b.lines("Retries and reroutes", "Further attempts at the same and at another endpoint.", units.CountsPerSecond,
		query{`sum by (` + ep + `) (rate(kptrace_retries_total` + where + rate + `))`, "retry " + pod},
		query{`sum by (` + ep + `) (rate(kptrace_reroutes_total` + where + rate + `))`, "reroute " + pod})
	b.lines("Resets", "Established connections ended by RST, by side.", units.CountsPerSecond,
		query{`sum by (reason, ` + ep + `) (rate(kptrace_connections_ended_total{` + byService + `, outcome="reset"}` + rate + `))`, "{{reason}} " + pod})
	b.lines("Unanswered, SYN retransmits", "By endpoint.", units.CountsPerSecond,
		query{`sum by (` + ep + `) (rate(kptrace_connections_unanswered_total` + where + rate + `))`, "unanswered " + pod},
		query{`sum by (` + ep + `) (rate(kptrace_syn_retransmits_total` + where + rate + `))`, "retransmits " + pod})
	b.lines("Clients", "Connections that ended, by client and result: the ten with the most (--metrics-clients).", units.CountsPerSecond,
		query{`topk(10, sum by (client_namespace, client, result) (rate(kptrace_client_connections_total` + where + rate + `)))`, "{{client_namespace}} {{client}} {{result}}"})
	b.row("Traffic")
	b.lines("IPVS bytes", "Out to the endpoint and in from it, by IPVS' own account (IPVS mode).", units.BytesPerSecondIEC,
		query{`sum by (direction, endpoint) (rate(kptrace_ipvs_bytes_total` + where + rate + `))`, "{{direction}} {{endpoint}}"})
	b.lines("IPVS packets", "Out to the endpoint and in from it, by IPVS' own account (IPVS mode).", units.CountsPerSecond,
		query{`sum by (direction, endpoint) (rate(kptrace_ipvs_packets_total` + where + rate + `))`, "{{direction}} {{endpoint}}"})
	b.lines("Bytes", "Out to the endpoint and in from it.", units.BytesPerSecondIEC,
		query{`sum by (direction, ` + ep + `) (rate(kptrace_bytes_total` + where + rate + `))`, "{{direction}} " + pod})
	b.lines("Packets", "Out to the endpoint and in from it.", units.CountsPerSecond,
		query{`sum by (direction, ` + ep + `) (rate(kptrace_packets_total` + where + rate + `))`, "{{direction}} " + pod})
	return b
}

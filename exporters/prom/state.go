package prom

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kptrace/kptrace/proxy"
)

// The nfacct counters that kube-proxy's rules feed.
const (
	acctInvalid   = "ct_state_invalid_dropped_pkts"
	acctLocalhost = "localhost_nps_accepted_pkts"
)

// ruleCounter is a Program that knows how many rules it has in which table.
type ruleCounter interface{ RuleCounts() map[proxy.Table]int }

// policyFamily is the labels of sync_proxy_rules_no_local_endpoints_total.
type policyFamily struct{ policy, family string }

// state makes, at each scrape, the metrics that are plain state.
type state struct{ *Exporter }

// Describe sends nothing, which makes state an unchecked collector: which of
// its metrics there are depends on the kernel and on the mode.
func (state) Describe(chan<- *prometheus.Desc) {}

// Collect sends what holds at this moment.
func (s state) Collect(ch chan<- prometheus.Metric) {
	send := func(kind prometheus.ValueType, name, help string, value float64, labels ...string) {
		var names, values []string
		for i := 0; i < len(labels); i += 2 {
			names, values = append(names, labels[i]), append(values, labels[i+1])
		}
		desc := prometheus.NewDesc(subsystem+"_"+name, alpha+help, names, nil)
		m, err := prometheus.NewConstMetric(desc, kind, value, values...)
		if err != nil {
			m = prometheus.NewInvalidMetric(desc, err)
		}
		ch <- m
	}
	gauge, counter := prometheus.GaugeValue, prometheus.CounterValue

	st := s.cfg.Sync()
	for _, f := range s.cfg.Families {
		if !st.LastSuccess.IsZero() {
			send(gauge, "sync_proxy_rules_last_timestamp_seconds", "The last time proxy rules were successfully synced", seconds(st.LastSuccess), family, f)
		}
		if !st.Queued.IsZero() {
			send(gauge, "sync_proxy_rules_last_queued_timestamp_seconds", "The last time a sync of proxy rules was queued", seconds(st.Queued), family, f)
		}
	}
	if s.cfg.Packets != nil {
		if n, ok := s.cfg.Packets(acctInvalid); ok {
			send(counter, "iptables_ct_state_invalid_dropped_packets_total", "packets dropped by iptables to work around conntrack problems", float64(n))
		}
		if n, ok := s.cfg.Packets(acctLocalhost); ok {
			send(counter, "iptables_localhost_nodeports_accepted_packets_total", "Number of packets accepted on nodeports of loopback interface", float64(n))
		}
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	var good *proxy.Snapshot
	if s.good != nil {
		good = s.good.Snapshot
	}
	pendingServices, pendingEndpoints := changes(good, s.asked)
	send(gauge, "sync_proxy_rules_endpoint_changes_pending", "Pending proxy rules Endpoint changes", float64(pendingEndpoints))
	send(counter, "sync_proxy_rules_endpoint_changes_total", "Cumulative proxy rules Endpoint changes", float64(s.slices))
	send(gauge, "sync_proxy_rules_service_changes_pending", "Pending proxy rules Service changes", float64(pendingServices))
	send(counter, "sync_proxy_rules_service_changes_total", "Cumulative proxy rules Service changes", float64(s.services))
	s.count()
	for _, f := range s.cfg.Families {
		for _, p := range []string{"internal", "external"} {
			send(gauge, "sync_proxy_rules_no_local_endpoints_total", "Number of services with a Local traffic policy and no endpoints",
				float64(s.noLocal[policyFamily{p, f}]), "traffic_policy", p, family, f)
		}
	}
	for _, table := range slices.SortedFunc(maps.Keys(s.rules), byFamily) {
		f := IPv4
		if table.IP6 {
			f = IPv6
		}
		send(gauge, "sync_proxy_rules_iptables_total", "Total number of iptables rules owned by kube-proxy",
			float64(s.rules[table]), "table", table.Name, family, f)
		send(gauge, "sync_proxy_rules_iptables_last", "Number of iptables rules written by kube-proxy in last sync",
			float64(s.last.Tables[table]), "table", table.Name, family, f)
	}
}

func byFamily(a, b proxy.Table) int {
	if a.IP6 != b.IP6 {
		if b.IP6 {
			return -1
		}
		return 1
	}
	return strings.Compare(a.Name, b.Name)
}

// count brings noLocal and rules up to the View in force. The caller holds mu.
func (s state) count() {
	v := s.good
	if v == nil || v == s.counted {
		return
	}
	s.counted, s.noLocal, s.rules = v, noLocal(v.Snapshot, v.Overlay), nil
	if c, ok := v.Program.(ruleCounter); ok {
		s.rules = c.RuleCounts()
	}
}

// noLocal counts the Service ports with a policy Local that have endpoints, but
// none on the node.
func noLocal(snap *proxy.Snapshot, o proxy.Overlay) map[policyFamily]int {
	n := map[policyFamily]int{}
	for i := range snap.Services {
		s := &snap.Services[i]
		if !s.UsesLocal() {
			continue
		}
		sel := s.Select(snap.Node, o)
		if len(sel.Local) > 0 || len(sel.Cluster) == 0 {
			continue
		}
		f := IPv4
		if s.Is6() {
			f = IPv6
		}
		if s.InternalLocal {
			n[policyFamily{"internal", f}]++
		}
		if s.ExternalLocal && s.ExternallyReachable() {
			n[policyFamily{"external", f}]++
		}
	}
	return n
}

func seconds(t time.Time) float64 { return float64(t.UnixNano()) / 1e9 }

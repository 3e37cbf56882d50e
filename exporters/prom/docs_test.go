package prom

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// everything is an Exporter with a value for each metric there is.
func everything(t *testing.T) *Exporter {
	t.Helper()
	w := busy(t, FlowConfig{Clients: 3})
	name := proxy.PortName{Namespace: "shop", Name: "foo", Port: "http", Proto: conntrack.TCP}
	addr := netip.MustParseAddrPort("10.0.0.1:8080")
	e := New(Config{
		Version: "v1", Families: []string{IPv4}, Mode: proxy.IPTables, Started: time.Unix(1, 0),
		Flows: FlowConfig{Clients: 3}, View: w.e.cfg.View, Exemplar: w.e.cfg.Exemplar,
		Sync: func() proxy.SyncStats {
			return proxy.SyncStats{Queued: time.Unix(5, 0), LastSuccess: time.Unix(4, 0), PendingSince: time.Now()}
		},
		Packets:   func(string) (uint64, bool) { return 1, true },
		Conntrack: func() (conntrack.Stats, error) { return conntrack.Stats{Entries: 7, Limit: 100}, nil },
		Tracer: func() Tracer {
			return Tracer{
				Sources: []Source{{SourceStats: trace.SourceStats{Source: trace.NFLog, Events: 3}}, {SourceStats: trace.SourceStats{Source: trace.Conntrack}}},
				Losses:  []trace.Loss{{Source: trace.NFLog, Where: "kernel", Events: 2}},
			}
		},
		Drift:  func() proxy.DriftStats { return proxy.DriftStats{Certain: 1} },
		Recent: func() []RecentList { return []RecentList{{Service: name, Endpoint: addr, Entries: 3, Limit: 100}} },
		IPVS: func() []trace.VirtualServer {
			return []trace.VirtualServer{{Service: name, Addr: netip.MustParseAddrPort("10.96.0.1:80"), Proto: conntrack.TCP, Scheduler: "rr", Servers: []trace.RealServer{{Addr: addr}, {Addr: netip.MustParseAddrPort("10.0.0.2:8080")}}}}
		},
		EndpointHealth: func() (EndpointHealth, bool) {
			return EndpointHealth{Out: 1, Outs: 2, Kept: 3, Answered: 4, Failed: 5, Freed: 6}, true
		},
		Findings: func() []Finding { return []Finding{{Code: "stale-conntrack", Severity: "warning", Count: 2}} },
		Counters: []func() []Counter{func() []Counter {
			return []Counter{{Name: "kptrace_example_total", Help: "An example.", Labels: []string{"kind", "x"}, Value: 1}}
		}},
	})
	e.flows.reader = w.e.flows.reader
	snap := w.view.Snapshot
	report := proxy.Report{Full: true, Tables: map[proxy.Table]int{{Name: "nat"}: 20}}
	p := program{rules: map[proxy.Table]int{{Name: "nat"}: 20}}
	e.Asked(snap)
	e.Observe(&proxy.View{Snapshot: snap, Program: p, Err: errors.New("refused")}, report)
	e.Observe(&proxy.View{Snapshot: snap, Program: p}, report)
	w.view.Program = indexed{p}
	return e
}

type indexed struct{ program }

func (indexed) Index() proxy.Index        { return proxy.Index{} }
func (indexed) Problems() []proxy.Problem { return nil }

// TestLint holds our own names against Prometheus' rules; kube-proxy's are as
// they are.
func TestLint(t *testing.T) {
	problems, err := promlint.New(strings.NewReader(scrape(t, everything(t)))).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if !strings.HasPrefix(p.Metric, "kubeproxy_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

const docsHead = `# Metrics

Generated from the registry by ` + "`make generate`" + `; a test keeps it true.

` + "`kptrace proxy`" + ` serves these at ` + "`/metrics`" + ` of ` + "`--metrics-bind-address`" + ` (port 10249, as
kube-proxy's). Text, OpenMetrics (with exemplars: the trace id of a connection
whose trace is exported) and protobuf (with native histograms) are spoken.

- The names under ` + "`kubeproxy_`" + ` are those of kube-proxy 1.36, with its types and
  labels; what was made for them works here.
- Connections are told apart by Service port and endpoint. The labels
  ` + "`namespace`, `service`, `port`, `protocol`" + ` name the Service port, ` + "`endpoint`" + ` is
  address and port, ` + "`pod`" + ` the pod behind it if known. Set ` + "`honor_labels: true`" + ` in the
  scrape configuration, or Prometheus renames those that its targets have, too.
- Series of an endpoint come with its first connection and go five minutes
  after it left the Service and its last connection ended. At most 50,000
  endpoints and 10,000 Service ports have series of their own; the rest is
  counted together under ` + "`other`" + `, and ` + "`kptrace_metrics_folded_updates_total`" + ` says
  how much that is.
- Clients are not told apart, unless ` + "`--metrics-clients=N`" + ` asks for it.
- With ` + "`--trace=false`" + ` nobody sees connections: the metrics about them, and those of
  Services and their endpoints, are left out.
- ` + "`kptrace_check_findings`" + ` is brought up to date every ` + "`--metrics-check-every`" + ` (5 min). Where
  there are more rules than ` + "`--metrics-check-max-rules`" + ` (10,000), of about 1 KB of memory
  each, every look is at all that is no Service's and at a part of the Services, in turn:
  with 160,000 rules each Service is looked at every 80 min. ` + "`kptrace check`" + ` looks at all.
- Histograms are by Service port; ` + "`--metrics-histograms`" + ` divides them by endpoint, or
  leaves them out.
- What events were lost cannot be counted: ` + "`kptrace_lost_events_total`" + ` and
  ` + "`kptrace_metrics_lost_updates_total`" + ` say how sure the rest is.

Those of the exporter of spans are in [otlp.md](otlp.md), those of the userspace
mode and of rerouting in [modes.md](modes.md). Beside these there are Go's
` + "`go_*` and `process_*`" + `, which tell kptrace's own CPU and memory.
`

// TestDocs keeps docs/metrics.md: every family, with type, labels and help.
func TestDocs(t *testing.T) {
	e := everything(t)
	families := gathered(t, e)
	seen := map[string]bool{}
	var b bytes.Buffer
	b.WriteString(docsHead)
	for _, part := range []struct {
		title string
		in    func(name string) bool
	}{
		{"Connections", func(n string) bool { return flowName(e, n) }},
		{"The node and kptrace itself", func(n string) bool {
			return strings.HasPrefix(n, "kptrace_") && !flowName(e, n) && n != "kptrace_example_total"
		}},
		{"kube-proxy's", func(n string) bool { return strings.HasPrefix(n, "kubeproxy_") }},
	} {
		fmt.Fprintf(&b, "\n## %s\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n", part.title)
		for _, f := range families {
			if part.in(f.GetName()) {
				seen[f.GetName()] = true
				help := strings.ReplaceAll(strings.TrimPrefix(f.GetHelp(), "[ALPHA] "), "|", "\\|")
				fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", f.GetName(), strings.ToLower(f.GetType().String()), labelsOf(f), help)
			}
		}
	}
	for _, f := range e.flows.flowFamilies() {
		if !seen[f.name] {
			t.Errorf("%s is missing: give everything() a value for it", f.name)
		}
	}
	golden(t, "../../docs/metrics.md", b.Bytes())
}

// labelsOf lists the labels of a family, those that vary least first.
func labelsOf(f *dto.MetricFamily) string {
	order := []string{"namespace", "service", "port", "protocol", "endpoint", "pod"}
	var names []string
	for _, m := range f.GetMetric() {
		for _, l := range m.GetLabel() {
			if !slices.Contains(names, l.GetName()) {
				names = append(names, l.GetName())
			}
		}
	}
	place := func(n string) int {
		if i := slices.Index(order, n); i >= 0 {
			return i
		}
		return len(order)
	}
	slices.SortFunc(names, func(a, b string) int { return cmp.Or(cmp.Compare(place(a), place(b)), cmp.Compare(a, b)) })
	for i := range names {
		names[i] = "`" + names[i] + "`"
	}
	return strings.Join(names, " ")
}

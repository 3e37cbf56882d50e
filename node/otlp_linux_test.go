package node

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/exporters/otlp"
	"github.com/kptrace/kptrace/exporters/prom"
	"github.com/kptrace/kptrace/proxy"
)

// TestExportMetrics holds the table of metrics in docs/otlp.md against those
// there are, and their values against the exporter's account.
func TestExportMetrics(t *testing.T) {
	now := time.Unix(1000, 0)
	list := otlpCounters(otlp.Stats{
		Overrun: 1,
		Traces: &otlp.SignalStats{Seen: 100, Sent: 50, Unsampled: 30, Dropped: 10, Failed: 4, Queued: 5, InFlight: 1, Capacity: 8,
			Items: 200, Rejected: 2, Requests: 7, Retries: 3, Failing: now.Add(-9 * time.Second)},
		Logs: &otlp.SignalStats{},
	}, now)
	list = append(list, (&node{cfg: Config{RequestGroup: 101}, tracer: newTracer(Config{}, nil)}).requestCounters()...)
	tableOf(t, "otlp.md", list)
	got := map[string]float64{}
	for _, c := range list {
		if len(c.Labels) == 0 || c.Labels[1] == "traces" {
			got[c.Name+" "+strings.Join(c.Labels, " ")] = c.Value
		}
	}
	for name, want := range map[string]float64{
		"kptrace_otlp_connections_total signal traces outcome sent": 50, "kptrace_otlp_connections_total signal traces outcome unsampled": 30,
		"kptrace_otlp_connections_total signal traces outcome dropped": 10, "kptrace_otlp_connections_total signal traces outcome failed": 4,
		"kptrace_otlp_queue_connections signal traces": 6, "kptrace_otlp_failing_seconds signal traces": 9,
		"kptrace_otlp_items_total signal traces": 200, "kptrace_otlp_overrun_updates_total ": 1,
	} {
		if got[name] != want {
			t.Errorf("%s is %v, want %v", name, got[name], want)
		}
	}
}

// TestModeMetrics holds the tables of metrics in docs/modes.md against those
// there are.
func TestModeMetrics(t *testing.T) {
	tableOf(t, "modes.md", append(relayCounters(proxy.RelayStats{PortRange: "1-2"}), rerouteCounters(proxy.RerouteStats{})...))
}

// tableOf wants exactly these metrics in the tables of a page.
func tableOf(t *testing.T, page string, list []prom.Counter) {
	t.Helper()
	text, err := os.ReadFile("../docs/" + page)
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		if name, _, ok := strings.Cut(strings.TrimPrefix(line, "| `"), "`"); ok && strings.HasPrefix(line, "| `kptrace_") {
			there[name] = true
		}
	}
	known := map[string]bool{}
	for _, c := range list {
		if known[c.Name] = true; !there[c.Name] {
			t.Errorf("%s is not in docs/%s", c.Name, page)
		}
	}
	for name := range there {
		if !known[name] {
			t.Errorf("docs/%s has %s, which there is not", page, name)
		}
	}
}

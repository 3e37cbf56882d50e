package node

import (
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/proxy"
)

// iptablesMode is a Backend by name only.
type iptablesMode struct{ proxy.Backend }

func (iptablesMode) Mode() proxy.Mode { return proxy.IPTables }

func TestTeller(t *testing.T) {
	var log strings.Builder
	var got []proxy.ObjectEvent
	cfg := Config{
		Name: "node1", Version: "v1", Backend: iptablesMode{}, Wanted: proxy.IPVS, Fallback: "no ip_vs",
		Logger: slog.New(slog.NewTextHandler(&log, nil)), Events: func(e proxy.ObjectEvent) { got = append(got, e) },
	}
	tl := newTeller(&cfg)
	tl.started(&cfg)
	tl.notServing(whatHealthz, errors.New("taken"))
	tl.notServing(whatMetrics, errors.New("taken"))
	foo := proxy.Problem{Object: "Service shop/foo", Field: "spec.externalIPs[0]", Message: "is no address"}
	bar := proxy.Problem{Object: "Service shop/bar", Message: "the kernel does not take its rules: line 7"}
	tl.problems(fromState, []proxy.Problem{foo, {File: "a.yaml", Message: "no YAML"}})
	tl.problems(fromProgram, nil) // others have nothing to say to it
	tl.problems(fromState, []proxy.Problem{foo})
	tl.problems(fromKernel, []proxy.Problem{bar})
	bar.Message = "the kernel does not take its rules: line 9"
	tl.problems(fromKernel, []proxy.Problem{bar})
	tl.problems(fromState, nil)
	tl.problems(fromState, []proxy.Problem{foo})
	tl.healthPort(proxy.Problem{Object: "Service shop/foo", Field: "spec.healthCheckNodePort", Message: "in use"})

	node, service := proxy.ObjectRef{Kind: "Node", Name: "node1"}, func(name string) proxy.ObjectRef {
		return proxy.ObjectRef{Kind: "Service", Namespace: "shop", Name: name}
	}
	invalid := proxy.ObjectEvent{Object: service("foo"), Type: "Warning", Reason: "InvalidService", Action: "Program", Note: "spec.externalIPs[0]: is no address", Shared: true}
	want := []proxy.ObjectEvent{
		{Object: node, Type: "Normal", Reason: "Starting", Action: "StartKubeProxy", Note: "kptrace v1 in the place of kube-proxy, mode iptables"},
		{Object: node, Type: "Warning", Reason: "ProxyModeFallback", Action: "StartKubeProxy", Note: "mode ipvs was asked for and cannot run: no ip_vs; using iptables"},
		{Object: node, Type: "Warning", Reason: "FailedToStartProxierHealthcheck", Action: "StartKubeProxy", Note: "taken"},
		{Object: node, Type: "Warning", Reason: "FailedToStartMetricServer", Action: "StartKubeProxy", Note: "taken"},
		invalid,
		{Object: service("bar"), Type: "Warning", Reason: "FailedToProgramService", Action: "Program", Note: "the kernel does not take its rules: line 7"},
		invalid, // it came back
		{Object: service("foo"), Type: "Warning", Reason: "FailedToStartServiceHealthcheck", Action: "Listen", Note: "spec.healthCheckNodePort: in use"},
	}
	for i := range max(len(got), len(want)) {
		if i >= len(got) || i >= len(want) || got[i] != want[i] {
			t.Fatalf("event %d of %+v, want %+v", i, got, want)
		}
	}
	for text, times := range map[string]int{"problem: Service shop/foo": 2, "problem: a.yaml": 1, "problem: Service shop/bar": 1, "mended: Service shop/foo": 1, "mended: a.yaml": 1} {
		if n := strings.Count(log.String(), text); n != times {
			t.Errorf("the log says %q %d times, want %d:\n%s", text, n, times, &log)
		}
	}
	newTeller(&Config{Name: "node1", Backend: iptablesMode{}, Logger: slog.New(slog.DiscardHandler)}).started(&cfg) // without events
}

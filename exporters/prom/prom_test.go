package prom

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

// program is a Program of the iptables mode as far as metrics look.
type program struct {
	proxy.Program
	rules map[proxy.Table]int
}

func (p program) RuleCounts() map[proxy.Table]int { return p.rules }

func servicePort(name string, local bool, endpoints ...proxy.Endpoint) proxy.Service {
	return proxy.Service{
		Name:      proxy.PortName{Namespace: "shop", Name: name, Port: "http"},
		ClusterIP: netip.MustParseAddr("10.96.0.1"), InternalLocal: local, Endpoints: endpoints,
	}
}

func scrape(t *testing.T, e *Exporter) string {
	t.Helper()
	rec := httptest.NewRecorder()
	e.Handler().ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	body, err := io.ReadAll(rec.Body)
	if err != nil || rec.Code != http.StatusOK {
		t.Fatalf("%d %v\n%s", rec.Code, err, body)
	}
	return string(body)
}

// full is an Exporter in which everything has happened once.
func full(t *testing.T) *Exporter {
	t.Helper()
	start := time.Unix(1_700_000_000, 0)
	stats := proxy.SyncStats{Queued: start.Add(5 * time.Second), LastSuccess: start.Add(4 * time.Second)}
	e := New(Config{
		Version: "v1", Families: []string{IPv4}, Mode: proxy.IPTables, Wanted: proxy.IPVS, Started: start,
		Sync: func() proxy.SyncStats { return stats },
		Packets: func(name string) (uint64, bool) {
			return uint64(len(name)), true
		},
	})
	remote := proxy.Endpoint{Addr: netip.MustParseAddrPort("10.0.0.1:80"), Ready: true, Serving: true}
	snap := &proxy.Snapshot{
		Services: []proxy.Service{servicePort("bar", true, remote), servicePort("foo", false, remote), servicePort("qux", true)},
		Triggers: map[string]proxy.Trigger{
			"shop/foo-1": {At: start.Add(1500 * time.Millisecond)},
			"shop/old-1": {At: start.Add(-time.Hour)},
		},
	}
	p := program{rules: map[proxy.Table]int{{Name: "filter"}: 7, {Name: "mangle"}: 0, {Name: "nat"}: 20}}
	view := func(err error) *proxy.View {
		return &proxy.View{Snapshot: snap, Program: p, From: start.Add(3 * time.Second), Done: start.Add(4 * time.Second), Err: err}
	}
	e.Asked(snap)
	e.Observe(view(errors.New("refused")), proxy.Report{})
	e.Observe(view(errors.New("refused")), proxy.Report{Full: true})
	e.Observe(view(nil), proxy.Report{Full: true, Tables: map[proxy.Table]int{{Name: "nat"}: 20}})
	e.Observe(view(nil), proxy.Report{Tables: map[proxy.Table]int{{Name: "nat"}: 3}})
	next := *snap
	next.Services = slices.Clone(snap.Services)
	next.Services[1].Endpoints = nil
	next.Services[2].Port = 81
	e.Asked(&next)
	e.Conntrack(IPv4, 2*time.Millisecond, 5)
	e.Healthz(200)
	e.Livez(503)
	return e
}

// TestFamilies compares names, types, labels and help of everything under
// kubeproxy_ with the list of kube-proxy 1.36, and values with what happened.
func TestFamilies(t *testing.T) {
	var got strings.Builder
	text := scrape(t, full(t))
	families := 0
	for line := range strings.Lines(text) {
		name := strings.TrimPrefix(strings.TrimPrefix(line, "# HELP "), "# TYPE ")
		if !strings.HasPrefix(name, "kubeproxy_") {
			continue
		}
		if strings.HasPrefix(line, "# TYPE kubeproxy_") {
			families++
		}
		if strings.Contains(line, "_bucket{") && !strings.Contains(line, `le="+Inf"`) {
			continue // counted below
		}
		got.WriteString(line)
	}
	if families != 23 {
		t.Errorf("%d families of kube-proxy, want 23", families)
	}
	want, err := os.ReadFile("testdata/families.txt")
	if err != nil {
		t.Fatal(err)
	}
	if have := got.String(); have != string(want) {
		t.Errorf("differs from testdata/families.txt:\n%s", have)
	}
	for name, n := range map[string]int{
		"sync_proxy_rules_duration_seconds": 15, "sync_full_proxy_rules_duration_seconds": 15,
		"sync_partial_proxy_rules_duration_seconds": 15, "conntrack_reconciler_sync_duration_seconds": 15,
		"network_programming_duration_seconds": 2 + 59 + 12 + 7,
	} {
		if got := strings.Count(text, "kubeproxy_"+name+"_bucket{"); got != n+1 {
			t.Errorf("%s has %d buckets, want %d and +Inf", name, got, n)
		}
	}
	for _, le := range []string{"0.25", "0.5", "59", "60", "65", "115", "120", "150", "300"} {
		if !strings.Contains(text, fmt.Sprintf("kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv4\",le=%q}", le)) {
			t.Errorf("no programming bucket %s", le)
		}
	}
}

// TestAbsent: what there is nothing to say of is not there.
func TestAbsent(t *testing.T) {
	e := New(Config{Families: []string{IPv4, IPv6}, Mode: proxy.IPTables, Sync: func() proxy.SyncStats { return proxy.SyncStats{} }})
	text := scrape(t, e)
	for _, name := range []string{"iptables_ct_state_invalid", "iptables_localhost_nodeports", "last_timestamp", "last_queued"} {
		if strings.Contains(text, name) {
			t.Errorf("%s is there:\n%s", name, text)
		}
	}
	for _, line := range []string{
		`kptrace_proxy_mode_fallback{mode="iptables",wanted="iptables"} 0`,
		`kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv6"} 0`,
		`kubeproxy_proxy_healthz_total{code="503"} 0`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("no line %s in\n%s", line, text)
		}
	}
}

// TestTriggers: a change is measured once, when the kernel has it, and not if
// it came before us.
func TestTriggers(t *testing.T) {
	e := New(Config{Families: []string{IPv4, IPv6}, Sync: func() proxy.SyncStats { return proxy.SyncStats{} }})
	at := time.Unix(1_700_000_000, 0)
	sync := func(err error, triggers map[string]proxy.Trigger) {
		e.Observe(&proxy.View{Snapshot: &proxy.Snapshot{Triggers: triggers}, From: at, Done: at.Add(2 * time.Second), Err: err}, proxy.Report{})
	}
	one := map[string]proxy.Trigger{"a/x": {At: at}}
	sync(errors.New("no"), one)
	sync(nil, one)
	sync(nil, map[string]proxy.Trigger{"a/x": {At: at}, "a/y": {At: at.Add(time.Second), IP6: true}})
	sync(nil, map[string]proxy.Trigger{"a/x": {At: at.Add(time.Second)}})
	text := scrape(t, e)
	for _, line := range []string{
		`kubeproxy_network_programming_duration_seconds_sum{ip_family="IPv4"} 3`,
		`kubeproxy_network_programming_duration_seconds_count{ip_family="IPv4"} 2`,
		`kubeproxy_network_programming_duration_seconds_sum{ip_family="IPv6"} 1`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("no line %s", line)
		}
	}
}

func TestChanges(t *testing.T) {
	ep := proxy.Endpoint{Addr: netip.MustParseAddrPort("10.0.0.1:80"), Ready: true}
	down := ep
	down.Ready = false
	two := servicePort("two", false, ep)
	two.Name.Port = "https"
	snap := func(s ...proxy.Service) *proxy.Snapshot { return &proxy.Snapshot{Services: s} }
	for name, tt := range map[string]struct {
		a, b                *proxy.Snapshot
		services, endpoints int
	}{
		"nothing":  {nil, nil, 0, 0},
		"first":    {nil, snap(servicePort("a", false, ep), servicePort("b", false)), 2, 1},
		"same":     {snap(servicePort("a", false, ep)), snap(servicePort("a", false, ep)), 0, 0},
		"policy":   {snap(servicePort("a", false, ep)), snap(servicePort("a", true, ep)), 1, 0},
		"endpoint": {snap(servicePort("a", false, ep)), snap(servicePort("a", false, down)), 0, 1},
		"a port":   {snap(servicePort("two", false, ep)), snap(servicePort("two", false, ep), two), 1, 1},
		"swapped":  {snap(servicePort("a", false, ep), servicePort("c", false, ep)), snap(servicePort("b", false, ep), servicePort("c", false, ep)), 2, 2},
		"gone":     {snap(servicePort("a", false, ep), servicePort("b", false)), snap(), 2, 1},
	} {
		if s, e := changes(tt.a, tt.b); s != tt.services || e != tt.endpoints {
			t.Errorf("%s: %d, %d, want %d, %d", name, s, e, tt.services, tt.endpoints)
		}
	}
}

// TestUntraced leaves out what nobody can count.
func TestUntraced(t *testing.T) {
	v := &proxy.View{Snapshot: &proxy.Snapshot{Services: []proxy.Service{servicePort("a", false)}}, Program: program{}}
	for _, untraced := range []bool{false, true} {
		text := scrape(t, New(Config{Untraced: untraced, View: func() *proxy.View { return v }}))
		if got := strings.Contains(text, "kptrace_service_endpoints{"); got == untraced {
			t.Errorf("untraced %v: series of Services: %v", untraced, got)
		}
	}
}

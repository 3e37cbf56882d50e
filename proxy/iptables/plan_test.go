package iptables

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// TestPlanOfNew holds the plan of Services whose rules are made when they are
// written against that of the same rules made before.
func TestPlanOfNew(t *testing.T) {
	for _, trace := range []bool{false, true} {
		cfg := overallConfig()
		cfg.Trace = trace
		s := overall()
		var many []string
		for i := range 110 {
			many = append(many, fmt.Sprintf("10.181.0.%d:80 local", i+1))
		}
		big := service("ns7/many", "tcp", "172.30.0.47", 80, many...)
		big.Type, big.NodePort, big.ExternalLocal, big.Affinity = "NodePort", 3007, true, 60e9
		s.Services = append(s.Services, big)
		p := New(cfg).Render(s, proxy.Overlay{}).(*program)
		other := New(cfg).Render(s, proxy.Overlay{}).(*program)
		var late, early []Change
		for i, u := range other.units {
			late = append(late, Change{Service: u.svc.Name, Kind: xtables.Missing, all: p.units[i]})
			early = u.render(whole).diff(early, u.svc.Name, &rendered{})
		}
		want, _ := plans(early)
		got, _ := plans(late)
		if diff := cmp.Diff(want.Text(), got.Text()); diff != "" {
			t.Errorf("trace %t: the plan differs (-made before +made late):\n%s", trace, diff)
		}
		if p.units[0].counted.Load() == nil {
			t.Error("writing the rules of a Service did not count them")
		}
		counts := p.RuleCounts()
		for table, n := range other.RuleCounts() {
			if counts[table] != n {
				t.Errorf("%v: %d rules counted as they were written, %d otherwise", table, counts[table], n)
			}
		}
	}
}

// TestRenderKeepsNoText bounds what a Service of 10 endpoints costs until its
// rules are written: their text would be some 250 allocations.
func TestRenderKeepsNoText(t *testing.T) {
	s := &proxy.Snapshot{}
	const n = 200
	for i := range n {
		var eps []string
		for e := range 10 {
			eps = append(eps, fmt.Sprintf("10.0.%d.%d:80", i, e+1))
		}
		s.Services = append(s.Services, service(fmt.Sprintf("ns/svc%d:http", i), "tcp", fmt.Sprintf("172.30.1.%d", i), 80, eps...))
	}
	got := testing.AllocsPerRun(5, func() { New(overallConfig()).Render(s, proxy.Overlay{}) }) / n
	if got > 16 {
		t.Errorf("%.1f allocations for each Service, want 16 at most", got)
	}
	t.Logf("%.1f allocations for each Service", got)
}

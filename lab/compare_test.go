package lab

import (
	"strings"
	"testing"

	"github.com/kptrace/kptrace/proxy"
)

// TestComparisonText prints what was counted, a dash for what was not, and what
// to make of it.
func TestComparisonText(t *testing.T) {
	calls := 31.04
	c := Comparison{Kernel: "6.1", CPUs: 1, Modes: []ModeCase{
		{Mode: proxy.Userspace, Fault: FaultNone, Connections: 90, Retried: 15, SystemCallsPerConnection: &calls, MBPerSecond: 10},
		{Mode: proxy.IPTables, Fault: FaultRefuse, Connections: 90, Failed: 30},
	}}
	text := func() string {
		var b strings.Builder
		if err := c.WriteText(&b); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	got := text()
	for _, want := range []string{"  31.0 ", "  – ", "kernel 6.1, 1 CPUs\nuserspace retried 15 connections with all pods well"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
	if strings.Contains(got, "iptables failed") || strings.Contains(got, "not counted") {
		t.Errorf("too much:\n%s", got)
	}
	c.NoSystemCalls = "because"
	if got := text(); !strings.Contains(got, "\nsystem calls were not counted: because\n") {
		t.Errorf("no reason in:\n%s", got)
	}
}

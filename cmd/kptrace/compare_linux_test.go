package main

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/lab"
	"github.com/kptrace/kptrace/proxy"
)

// TestCompare compares two modes in short: userspace mode loses nothing, the
// kernel's rules lose what meets the dead pod, and rerouting saves it from a
// silent one.
func TestCompare(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	run := d.start("kptrace", "lab", "compare", "--modes", "userspace,iptables", "--connections", "90", "--rate", "100", "--fast", "500ms", "--json")
	if code := run.end(4 * time.Minute); code != 0 { // seven labs, one after the other
		t.Fatalf("exit %d: %s", code, run.err)
	}
	out := run.out.String()
	var c lab.Comparison
	dec := json.NewDecoder(strings.NewReader(out))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil || strings.Count(out, "\n") != 1 {
		t.Fatalf("%v: %s", err, out)
	}
	if len(c.Modes) != 7 || c.CPUs == 0 || c.Kernel == "" {
		t.Fatalf("%s", out)
	}
	if root := os.Geteuid() == 0 && !netns.Rootless(); root != (c.NoSystemCalls == "") {
		t.Errorf("root: %v; system calls: %q", root, c.NoSystemCalls)
	}
	for _, m := range c.Modes {
		if (m.SystemCallsPerConnection != nil) != (c.NoSystemCalls == "") || (m.SystemCallsPerMB != nil) != (c.NoSystemCalls == "" && m.Fault == lab.FaultNone) {
			t.Errorf("%s, %s: system calls %v, %v", m.Mode, m.Fault, m.SystemCallsPerConnection, m.SystemCallsPerMB)
		}
		loses := m.Mode == proxy.IPTables && m.Fault != lab.FaultNone && !m.Reroute
		retries := m.Mode == proxy.Userspace && m.Fault != lab.FaultNone || m.Reroute
		if m.Connections != 90 || (m.Failed > 0) != loses || (m.Retried > 0) != retries {
			t.Errorf("%s, %s, reroute %v: %d connections, %d failed, %d retried", m.Mode, m.Fault, m.Reroute, m.Connections, m.Failed, m.Retried)
		}
		sum := 0.0
		for _, s := range m.Shares {
			sum += s.Share
		}
		if len(m.Shares) != 3 || sum < 0.999 || sum > 1.001 || m.EstablishedMs == nil || m.ConnectionsPerSecond <= 0 ||
			m.SyncMs <= 0 || m.ContextSwitchesPerConnection <= 0 || (m.MBPerSecond > 0) != (m.Fault == lab.FaultNone) {
			t.Errorf("%+v", m)
		}
	}
	if code, _, _ := d.kptrace("lab", "compare", "--modes", "nftables"); code != 2 {
		t.Errorf("an unknown mode: exit code %d", code)
	}
}

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/lab"
)

// TestCauses lets one fault after the other happen under traffic, and holds the
// reason of each failed connection to the Service in question against what was
// done. It prints the confusion matrix. Of those that failed 95 % must have the
// right reason, none a wrong one, and without a fault none may fail. Some alone:
// KPTRACE_INCIDENTS=docker,route.
func TestCauses(t *testing.T) {
	t.Parallel()
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			t.Parallel()
			causes(t, flavour)
		})
	}
}

// vague are reasons that say what was seen and no cause: not right where the
// cause is another one, but not wrong either.
func vague(reason string) bool {
	reason, _, _ = strings.Cut(reason, " ")
	return slices.Contains([]string{"", "syn-unanswered", "no-reply", "dropped-on-node"}, reason)
}

func causes(t *testing.T, flavour string) {
	d := newDesk(t)
	up := d.start("kptrace", "lab", "incident", "closed-port", "--iptables-flavour", flavour)
	up.await(up.out, "End it by Ctrl-C", 60*time.Second)
	d.t.Cleanup(func() { _ = up.stop(2) })

	var matrix strings.Builder
	right, all := 0, 0
	for n, in := range lab.Incidents() {
		if only := os.Getenv("KPTRACE_INCIDENTS"); only != "" && !slices.Contains(strings.Split(only, ","), in.Name) {
			continue
		}
		began := time.Now()
		d.must("lab", "incident", fmt.Sprint(n+1), "--change")
		began = began.Add(time.Since(began)) // what began before may belong to the last one
		if in.Check != "" {
			wantFinding(t, d, in)
			continue
		}
		var seen map[string]int // by reason
		var good int
		for deadline := time.Now().Add(40 * time.Second); ; time.Sleep(500 * time.Millisecond) {
			seen, good = map[string]int{}, 0
			for _, f := range failures(t, d, in.Service, began.Add(time.Second)) {
				reason := string(f.Reason)
				if vague(reason) && f.Cause != "" {
					reason += " (" + f.Cause + ")"
				}
				seen[reason]++
				if f.Reason == in.Reason {
					good++
				}
			}
			sum := 0
			for _, k := range seen {
				sum += k
			}
			if sum >= 4 && float64(good) >= 0.95*float64(sum) || time.Now().After(deadline) {
				right, all = right+good, all+sum
				break
			}
		}
		fmt.Fprintf(&matrix, "%-12s %-22s %v\n", in.Name, in.Reason, seen)
		if good == 0 {
			t.Errorf("%s: no connection to %s failed for %s: %v", in.Name, in.Service, in.Reason, seen)
		}
		for reason, k := range seen {
			if reason != string(in.Reason) && !vague(reason) {
				t.Errorf("%s: %d connections are said to have failed for %s, and it was %s", in.Name, k, reason, in.Reason)
			}
		}
	}
	healed(t, d, &matrix)
	t.Logf("flavour %s: %d of %d failed connections have the right reason\n%-12s %-22s %s\n%s", flavour, right, all, "FAULT", "CAUSE", "SEEN", matrix.String())
	if float64(right) < 0.95*float64(all) {
		t.Errorf("only %d of %d reasons are right", right, all)
	}
}

// failures lists failed connections to a Service that began after a time, and at
// least two seconds ago, so that all is known of them that will be.
func failures(t *testing.T, d *desk, service string, since time.Time) []text.FlowJSON {
	t.Helper()
	out := d.must("follow", "svc/"+service, "-n", "shop", "--outcome", "failed", "--since", since.Format(time.RFC3339Nano), "--for", "0s", "-o", "jsonl")
	var flows []text.FlowJSON
	for line := range strings.Lines(out) {
		var f text.FlowJSON
		if err := json.Unmarshal([]byte(line), &f); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if time.Since(f.Time) > 2*time.Second {
			flows = append(flows, f)
		}
	}
	return flows
}

// wantFinding waits for a finding of kptrace check.
func wantFinding(t *testing.T, d *desk, in lab.Incident) {
	t.Helper()
	out := ""
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		if _, out, _ = d.kptrace("check"); strings.Contains(out, in.Check) {
			return
		}
	}
	t.Errorf("%s: %s is not in: %s", in.Name, in.Check, out)
}

// healed undoes the last fault, and wants no failures.
func healed(t *testing.T, d *desk, matrix *strings.Builder) {
	t.Helper()
	d.must("lab", "incident", "--heal")
	since := time.Now().Add(1500 * time.Millisecond)
	time.Sleep(time.Until(since.Add(5 * time.Second)))
	n := 0
	for _, s := range []string{"foo", "sticky", "front", "dns"} {
		for _, f := range failures(t, d, s, since) {
			n++
			t.Errorf("without a fault: %s of %s at %v: %s %s", f.Outcome, s, f.Time, f.Reason, f.Cause)
		}
	}
	fmt.Fprintf(matrix, "%-12s %-22s %d failed\n", "(none)", "-", n)
	if code, out, _ := d.kptrace("check"); code != 0 || out != "" {
		t.Errorf("healed, check says: %s", out)
	}
}

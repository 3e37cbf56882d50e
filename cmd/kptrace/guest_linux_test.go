package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/umlguest/guesttest"
	"github.com/kptrace/kptrace/lab"
)

// guestLab runs a lab in a guest, and returns its flows by Service and its
// summary.
func guestLab(t *testing.T, args ...string) (map[string][]text.FlowJSON, *lab.Summary) {
	t.Helper()
	guesttest.Here(t)
	d := newDesk(t)
	var out, errs bytes.Buffer
	_, err := exec.Run(t.Context(), exec.Spec{
		Path: "kptrace", Args: append([]string{"lab", "run", "-o", "jsonl"}, args...),
		Env: d.env, Stdout: &out, Stderr: &errs, Grace: time.Minute,
	})
	if err != nil {
		t.Fatalf("%v\n%s\n%s", err, errs.String(), out.String())
	}
	if !strings.Contains(errs.String(), "kernel: ") {
		t.Errorf("stderr does not say which kernel it was:\n%s", errs.String())
	}
	flows := map[string][]text.FlowJSON{}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	for _, line := range lines[:len(lines)-1] {
		var f text.FlowJSON
		if err := json.Unmarshal([]byte(line), &f); err != nil {
			t.Fatalf("%v: %q", err, line)
		}
		flows[f.Service.Name] = append(flows[f.Service.Name], f)
	}
	var s lab.Summary
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &s); err != nil {
		t.Fatalf("%v: %q", err, lines[len(lines)-1])
	}
	if !s.OK() {
		t.Errorf("summary: %s", lines[len(lines)-1])
	}
	return flows, &s
}

// The lab in the IPVS mode: each scheduler is named, what it looks at is shown,
// and every connection with the endpoint that answered.
func TestLabIPVS(t *testing.T) {
	flows, _ := guestLab(t, "--mode", "ipvs", "--server-health", "--for", "12s")
	for service, algorithm := range map[string]string{
		"turns": "rr", "least": "lc", "weighted": "wrr", "hashed": "sh", "sticky": "rr", "signal": "rr",
	} {
		if len(flows[service]) == 0 {
			t.Errorf("no connection to %s", service)
		}
		backends := map[string]map[string]bool{}
		for _, f := range flows[service] {
			if f.Decision.Mode != "ipvs" || f.Decision.Algorithm != algorithm || f.Backend == nil {
				t.Errorf("%s: %+v", service, f)
				continue
			}
			from := f.Client.Pod
			if backends[from] == nil {
				backends[from] = map[string]bool{}
			}
			backends[from][f.Backend.Pod] = true
		}
		for client, pods := range backends {
			if (service == "hashed" || service == "sticky") != (len(pods) == 1) {
				t.Errorf("%s: %s came to %v", service, client, pods)
			}
		}
	}
	loads, hits := 0, 0
	for _, f := range flows["least"] {
		if l := f.Decision.Load; l != nil && len(l.Servers) == 3 {
			loads++
		}
	}
	for _, f := range flows["sticky"] {
		if f.Decision.Affinity == "hit" {
			hits++
		}
	}
	if loads == 0 || hits == 0 {
		t.Errorf("%d picks by connections show them, %d hits of affinity; want some", loads, hits)
	}
	sctpCloses(t, flows["signal"])

	// When one endpoint falls silent, connections to it are tried elsewhere.
	retried := 0
	for _, f := range flows["retried"] {
		if len(f.Attempts) == 2 && f.Attempts[0].Pod == "silent" && f.Attempts[1].Pod != "silent" && f.Outcome == "closed" {
			retried++
		}
	}
	if retried == 0 {
		t.Errorf("of %d connections to shop/retried none was tried again at another endpoint", len(flows["retried"]))
	}
}

// The same Services in the iptables mode, on the same kernel.
func TestLabGuest(t *testing.T) {
	flows, _ := guestLab(t, "--guest", "--scenario", "schedulers", "--for", "6s")
	for _, f := range flows["least"] {
		if f.Decision.Mode != "iptables" || f.Decision.Algorithm != "random" {
			t.Errorf("%+v", f.Decision)
		}
	}
	sctpCloses(t, flows["signal"])
}

// sctpCloses wants associations that were seen from INIT to SHUTDOWN.
func sctpCloses(t *testing.T, flows []text.FlowJSON) {
	t.Helper()
	closed := 0
	for _, f := range flows {
		if f.Proto != "sctp" {
			t.Errorf("protocol %q", f.Proto)
		}
		if f.Outcome == "closed" && f.EstablishedMs != nil && f.DurationMs != nil {
			closed++
		}
	}
	if closed == 0 {
		t.Errorf("no SCTP association was seen to open and close: %+v", flows)
	}
}

func TestLabUpRefusesGuest(t *testing.T) {
	d := newDesk(t)
	_, err := exec.Run(t.Context(), exec.Spec{Path: "kptrace", Args: []string{"lab", "up", "--guest"}, Env: d.env})
	if err == nil || !strings.Contains(err.Error(), "cannot be reached from outside") || !strings.Contains(err.Error(), "kptrace lab run") {
		t.Errorf("%v; want a refusal that says why and what to do", err)
	}
}

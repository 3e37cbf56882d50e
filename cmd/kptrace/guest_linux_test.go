package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/lab"
)

// The lab runs in a guest as it does here: every connection is shown, with the
// endpoint that answered.
func TestLabInGuest(t *testing.T) {
	d := newDesk(t)
	var out, errs bytes.Buffer
	_, err := exec.Run(t.Context(), exec.Spec{
		Path: "kptrace", Args: []string{"lab", "run", "--guest", "--for", "3s", "-o", "json"},
		Env: d.env, Stdout: &out, Stderr: &errs, Grace: time.Minute,
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, errs.String())
	}
	if !strings.Contains(errs.String(), "kernel: a guest, user-mode Linux ") {
		t.Errorf("stderr does not say which kernel it was:\n%s", errs.String())
	}
	var s lab.Summary
	if err := json.Unmarshal(out.Bytes(), &s); err != nil {
		t.Fatalf("%v: %q", err, out.String())
	}
	if !s.OK() || len(s.Services) < 5 {
		t.Errorf("summary: %s", out.String())
	}
}

func TestLabUpRefusesGuest(t *testing.T) {
	d := newDesk(t)
	_, err := exec.Run(t.Context(), exec.Spec{Path: "kptrace", Args: []string{"lab", "up", "--guest"}, Env: d.env})
	if err == nil || !strings.Contains(err.Error(), "cannot be reached from outside") || !strings.Contains(err.Error(), "kptrace lab run") {
		t.Errorf("%v; want a refusal that says why and what to do", err)
	}
}

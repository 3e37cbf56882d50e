package proxytest

import (
	"math"
	"testing"

	"github.com/kptrace/kptrace/proxy"
)

// Run holds a mode's prediction against Cases or Cases6. walk returns what the mode
// does in a Setup, such as the Walk of its Program.
func Run(t *testing.T, cases []Case, walk func(*testing.T, Setup) func(proxy.Packet) proxy.Outcome) {
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			predict := walk(t, c.Setup)
			for _, row := range c.Rows {
				t.Run(row.Name(), func(t *testing.T) { Check(t, row, predict(row.Packet())) })
			}
		})
	}
}

// Check holds one outcome against a row.
func Check(t *testing.T, row Row, got proxy.Outcome) {
	t.Helper()
	w := row.Want
	name := ""
	if got.Service != (proxy.PortName{}) {
		name = got.Service.String()
	}
	if got.Verdict != w.Verdict || name != w.Service || got.Via != w.Via || got.Reason != w.Reason {
		t.Errorf("got %s %s %s %q, want %s %s %s %q", got.Verdict, name, got.Via, got.Reason,
			w.Verdict, w.Service, w.Via, w.Reason)
	}
	if w.Verdict == proxy.Pass {
		return
	}
	if got.Policy != w.Policy || got.Excluded != w.Excluded || got.Affinity != w.Affinity {
		t.Errorf("got policy %s, excluded %+v, affinity %s; want %s, %+v, %s", got.Policy, got.Excluded, got.Affinity,
			w.Policy, w.Excluded, w.Affinity)
	}
	if len(got.Choices) != len(w.Endpoints) {
		t.Errorf("got choices %v, want endpoints %v", got.Choices, w.Endpoints)
	}
	sum := 0.0
	for _, c := range got.Choices {
		sum += c.Probability
		if len(c.Steps) == 0 {
			t.Errorf("no steps to %s", c.Endpoint)
		}
	}
	if w.Verdict == proxy.Forward && math.Abs(sum-1) > 1e-9 {
		t.Errorf("probabilities add up to %v", sum)
	}
	for _, ep := range w.Endpoints {
		c, ok := got.Find(ep)
		if !ok {
			t.Errorf("%s is not among the choices %v", ep, got.Choices)
			continue
		}
		// Rules hold probabilities in 31 bits.
		if want := 1 / float64(len(w.Endpoints)); math.Abs(c.Probability-want) > 1e-8 {
			t.Errorf("probability of %s is %v, want %v", ep, c.Probability, want)
		}
		if want := row.MasqueradeOf(ep); c.Masquerade != want {
			t.Errorf("masquerade to %s is %q, want %q", ep, c.Masquerade, want)
		}
	}
}

package proxy

import (
	"testing"
	"time"
)

// TestDriftGate lets somebody rewrite our rules for ever.
func TestDriftGate(t *testing.T) {
	var g DriftGate
	sure, doubt := Drift{Certain: true, What: "rules"}, Drift{}
	now, passed := time.Now(), uint64(0)
	for range 3600 {
		now = now.Add(time.Second)
		if g.Pass(now, sure, time.Millisecond) {
			passed++
		}
	}
	if passed < 60 || passed > 70 {
		t.Errorf("%d repairs in an hour of fighting", passed)
	}
	if s := g.Stats(); s.Certain != passed || s.Held != 3600-passed || s.Doubts != 0 || s.LastWhat != "rules" {
		t.Errorf("%d repairs, %+v", passed, s)
	}
	now = now.Add(time.Hour)
	if !g.Pass(now, sure, 0) || g.Pass(now.Add(time.Millisecond), sure, 0) || !g.Pass(now.Add(2*time.Second), sure, 0) {
		t.Error("no fresh start after a calm")
	}
	g = DriftGate{}
	if !g.Pass(now, doubt, 2*time.Second) || g.Pass(now.Add(100*time.Second), doubt, 2*time.Second) || !g.Pass(now.Add(201*time.Second), doubt, 2*time.Second) {
		t.Error("doubt costs more than a hundredth")
	}
	if written := (Drift{Written: true}); !g.Pass(now.Add(210*time.Second), written, 2*time.Second) || g.Stats().Doubts != 3 {
		t.Error("what was written waits as doubt does, or is counted as certain")
	}
}

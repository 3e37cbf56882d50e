package lab

import (
	"testing"
	"time"
)

func TestParseFault(t *testing.T) {
	for text, want := range map[string]PlannedFault{
		"blackhole after=4s": {FaultBlackhole, 4 * time.Second},
		"refuse":             {FaultRefuse, 0},
	} {
		if got, err := parseFault(text); err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "slow", "blackhole 4s", "kill after=soon", "kill after=-1s"} {
		if got, err := parseFault(text); err == nil {
			t.Errorf("%q: %+v, want an error", text, got)
		}
	}
}

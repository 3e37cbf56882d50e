package lab

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// PlannedFault is a fault that happens to a pod by itself, some time after
// traffic began.
type PlannedFault struct {
	// Kind is one of the Fault words but FaultSlow.
	Kind  string
	After time.Duration
}

// parseFault reads a FaultAnnotation: "blackhole after=4s".
func parseFault(text string) (PlannedFault, error) {
	words := strings.Fields(text)
	if len(words) == 0 {
		return PlannedFault{}, errors.New("is empty: use a fault such as blackhole after=4s")
	}
	f := PlannedFault{Kind: words[0]}
	switch f.Kind {
	case FaultKill, FaultBlackhole, FaultRefuse:
	default:
		return f, fmt.Errorf("unknown fault %q: use %s, %s or %s", f.Kind, FaultKill, FaultBlackhole, FaultRefuse)
	}
	for _, w := range words[1:] {
		value, ok := strings.CutPrefix(w, "after=")
		var err error
		if f.After, err = time.ParseDuration(value); !ok || err != nil || f.After < 0 {
			return f, fmt.Errorf("%q is not like after=4s", w)
		}
	}
	return f, nil
}

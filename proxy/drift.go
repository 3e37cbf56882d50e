package proxy

import (
	"sync"
	"time"
)

const (
	// driftHold is the wait after a repair until the next one. It doubles up
	// to driftHoldMost while rules are changed again and again, so that two
	// who both want to be right do not keep a CPU busy, and is as at first
	// after driftCalm without a repair.
	driftHold     = time.Second
	driftHoldMost = time.Minute
	driftCalm     = 2 * time.Minute
	// doubtShare is how much rarer than a full comparison takes mere doubt
	// leads to one.
	doubtShare = 100
)

// DriftGate counts what a Watcher sees and lets repairs through, the more rarely
// the more often they are needed. The zero value is ready.
type DriftGate struct {
	mu    sync.Mutex // protects what follows
	stats DriftStats
	last  time.Time
	hold  time.Duration
}

// Pass counts a drift and reports whether to act on it now. full is how long
// comparing everything takes.
func (g *DriftGate) Pass(now time.Time, d Drift, full time.Duration) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	since := now.Sub(g.last)
	if g.last.IsZero() || since > driftCalm {
		g.hold = 0
	}
	if since < g.hold || !d.Certain && !d.Written && since < doubtShare*full {
		g.stats.Held++
		return false
	}
	g.last, g.hold = now, min(max(2*g.hold, driftHold), driftHoldMost)
	g.stats.Last, g.stats.LastWhat = now, d.What
	if d.Certain {
		g.stats.Certain++
	} else {
		g.stats.Doubts++
	}
	return true
}

// Stats may be called at any time.
func (g *DriftGate) Stats() DriftStats {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.stats
}

package iptables

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

const (
	// lookEvery is how often Watch looks whether others wrote to our tables.
	lookEvery = time.Second
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

// Watch calls changed when others wrote to our tables, until ctx ends, which
// is no error: within a second where the kernel tells, within 3 s where the
// content of legacy tables has to be read and whoever wrote took the lock of
// iptables. It then expects Forget and Apply,
// which compare everything and write what differs. Before the flavour is
// settled it waits.
func (b *Backend) Watch(ctx context.Context, changed func(proxy.Drift)) error {
	if err := b.openWatch(ctx); err != nil {
		return err
	}
	defer b.closeWatch()
	tick := time.NewTicker(b.lookEvery)
	defer tick.Stop()
	var g gate
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if ctx.Err() != nil {
			return nil
		}
		if !b.apply.TryLock() {
			continue // it is just being written
		}
		sight, took := xtables.Sight{}, b.lastFull
		if b.applied != nil {
			sight = b.watch.Look()
		}
		b.apply.Unlock()
		if sight.Suspicion == xtables.Quiet {
			continue
		}
		certain := sight.Suspicion == xtables.Certain
		if !g.pass(time.Now(), certain, took) {
			b.count(func(s *proxy.DriftStats) { s.Held++ })
			continue
		}
		b.count(func(s *proxy.DriftStats) {
			s.Last, s.LastWhat = time.Now(), sight.What
			if certain {
				s.Certain++
			} else {
				s.Doubts++
			}
		})
		changed(proxy.Drift{Certain: certain, What: sight.What})
	}
}

// DriftStats may be called at any time.
func (b *Backend) DriftStats() proxy.DriftStats {
	b.drift.Lock()
	defer b.drift.Unlock()
	return b.driftStats
}

func (b *Backend) count(f func(*proxy.DriftStats)) {
	b.drift.Lock()
	defer b.drift.Unlock()
	f(&b.driftStats)
}

// openWatch waits for the flavour and opens the watch. What was applied before
// is read once more, for nobody was looking.
func (b *Backend) openWatch(ctx context.Context) error {
	for {
		b.apply.Lock()
		if b.runner != nil {
			break
		}
		b.apply.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(b.lookEvery / 10):
		}
	}
	defer b.apply.Unlock()
	if b.watch != nil {
		return fmt.Errorf("proxy/iptables: somebody watches already")
	}
	w, err := xtables.OpenWatch(xtables.WatchConfig{
		Flavour: b.flavour, Family: b.cfg.Family, Netns: b.cfg.Tools.Netns, Tables: tables[:], LockFile: b.lockFile(),
		Ours: func(table, chain string) bool {
			return owned(table, chain) || table == "filter" && chain == chainFirewall
		},
		Targets: []string{"KUBE-", chainTrace},
	})
	if err != nil {
		return fmt.Errorf("proxy/iptables: %w", err)
	}
	b.watch, b.applied = w, nil
	return nil
}

// lockFile is where the tools keep the lock of iptables-legacy.
func (b *Backend) lockFile() string {
	for _, e := range b.cfg.Tools.Env {
		if path, ok := strings.CutPrefix(e, "XTABLES_LOCKFILE="); ok {
			return path
		}
	}
	return os.Getenv("XTABLES_LOCKFILE")
}

func (b *Backend) closeWatch() {
	b.apply.Lock()
	defer b.apply.Unlock()
	if b.watch != nil {
		_ = b.watch.Close()
		b.watch = nil
	}
}

// gate lets repairs through, the more rarely the more often they are needed.
type gate struct {
	last time.Time
	hold time.Duration
}

// pass reports whether to act now. full is how long a full comparison takes.
func (g *gate) pass(now time.Time, certain bool, full time.Duration) bool {
	since := now.Sub(g.last)
	if g.last.IsZero() || since > driftCalm {
		g.hold = 0
	}
	if since < g.hold || !certain && since < doubtShare*full {
		return false
	}
	g.last, g.hold = now, min(max(2*g.hold, driftHold), driftHoldMost)
	return true
}

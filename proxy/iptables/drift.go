package iptables

import (
	"context"
	"fmt"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// lookEvery is how often Watch looks whether others wrote to our tables.
const lookEvery = time.Second

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
		d := proxy.Drift{Certain: sight.Suspicion == xtables.Certain, Written: sight.Suspicion == xtables.Written, What: sight.What}
		if b.drift.Pass(time.Now(), d, took) {
			changed(d)
		}
	}
}

// DriftStats may be called at any time.
func (b *Backend) DriftStats() proxy.DriftStats { return b.drift.Stats() }

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
		Flavour: b.flavour, Family: b.cfg.Family, Netns: b.cfg.Tools.Netns, Tables: tables[:], LockFile: b.cfg.Tools.LockFile(),
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

// aside runs f, in which the other family is written: that it uses the lock of
// iptables-legacy, which both have in common, is no sign of others.
func (b *Backend) aside(f func()) {
	b.apply.Lock()
	defer b.apply.Unlock()
	if b.watch == nil {
		f()
		return
	}
	b.watch.Aside(f)
}

func (b *Backend) closeWatch() {
	b.apply.Lock()
	defer b.apply.Unlock()
	if b.watch != nil {
		_ = b.watch.Close()
		b.watch = nil
	}
}

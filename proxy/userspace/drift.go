package userspace

import (
	"context"
	"fmt"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// lookEvery is how often Watch looks whether others wrote to our tables.
const lookEvery = time.Second

// Watch calls changed when others wrote to our tables, until ctx ends, which is
// no error: within a second with iptables-nft, within 3 s where the content of
// legacy tables has to be read and whoever wrote took the lock of iptables.
// Before the flavour is settled it waits.
func (b *Backend) Watch(ctx context.Context, changed func(proxy.Drift)) error {
	defer b.closeWatches()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		late, err := b.openWatches()
		if err != nil {
			return err
		}
		if late {
			changed(proxy.Drift{What: "nobody watched until now"})
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if ctx.Err() != nil {
			return nil
		}
		if d, full := b.look(); d.What != "" && b.drift.Pass(time.Now(), d, full) {
			changed(d)
		}
	}
}

// DriftStats may be called at any time.
func (b *Backend) DriftStats() proxy.DriftStats { return b.drift.Stats() }

// look says what others did since tables were compared last, the worst of both
// families, and how long comparing takes.
func (b *Backend) look() (worst proxy.Drift, full time.Duration) {
	if !b.apply.TryLock() {
		return worst, 0 // it is just being written
	}
	defer b.apply.Unlock()
	for _, k := range b.kernel {
		full += k.lastFull
		if !k.known || k.watch == nil {
			continue // the next sync looks at everything
		}
		sight := k.watch.Look()
		certain := sight.Suspicion == xtables.Certain
		if sight.Suspicion != xtables.Quiet && (worst.What == "" || certain && !worst.Certain) {
			worst = proxy.Drift{Certain: certain, Written: sight.Suspicion == xtables.Written, What: sight.What}
		}
	}
	return worst, full
}

// openWatches opens what is not open. What was applied before is to be read once
// more, for nobody was looking; late says that there is such.
func (b *Backend) openWatches() (late bool, err error) {
	b.apply.Lock()
	defer b.apply.Unlock()
	for f, k := range b.kernel {
		if k.watch != nil {
			continue
		}
		k.watch, err = xtables.OpenWatch(xtables.WatchConfig{
			Flavour: b.flavour, Family: f, Netns: b.cfg.Tools.Netns, LockFile: b.cfg.Tools.LockFile(),
			Tables: []string{"filter", "nat"}, Ours: owned, Targets: []string{"KUBE-PORTALS-", "KUBE-NODEPORT-"},
		})
		if err != nil {
			return false, fmt.Errorf("proxy/userspace: %w", err)
		}
		late, k.known = late || k.known, false
	}
	return late, nil
}

func (b *Backend) closeWatches() {
	b.apply.Lock()
	defer b.apply.Unlock()
	for _, k := range b.kernel {
		if k.watch != nil {
			_ = k.watch.Close()
			k.watch = nil
		}
	}
}

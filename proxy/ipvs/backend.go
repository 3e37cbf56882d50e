package ipvs

import (
	"fmt"
	"sync"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Backend is the IPVS mode of both address families. It implements
// proxy.Backend, proxy.Forgetter and proxy.Watcher.
type Backend struct {
	cfg       Config
	scheduler proxy.Scheduler

	render   sync.Mutex // protects what follows
	families [2]family

	apply   sync.Mutex // protects what follows
	flavour xtables.Flavour
	// runners write rules, by family; none until Preflight. The second is nil
	// where the node has no IPv6.
	runners []*xtables.Runner
	// applied is what the kernel is known to hold, nil if nothing is known.
	applied *held
	// doubt says that the kernel refused something, or that others may have
	// changed something: the next Apply reads everything.
	doubt bool
	// last is what was applied last.
	last *program

	drift      sync.Mutex // protects what follows
	driftStats proxy.DriftStats
}

var (
	_ proxy.Backend   = (*Backend)(nil)
	_ proxy.Forgetter = (*Backend)(nil)
	_ proxy.Watcher   = (*Backend)(nil)
)

// New returns a Backend that has not touched the kernel. The error is about
// Config.Scheduler.
func New(cfg Config) (*Backend, error) {
	b := &Backend{cfg: cfg.withDefaults()}
	var err error
	if b.scheduler, err = proxy.ParseScheduler(b.cfg.Scheduler); err != nil {
		return nil, fmt.Errorf("proxy/ipvs: %w", err)
	}
	return b, nil
}

// Mode returns proxy.IPVS.
func (b *Backend) Mode() proxy.Mode { return proxy.IPVS }

// Forget makes the next Apply read everything anew.
func (b *Backend) Forget() {
	b.apply.Lock()
	defer b.apply.Unlock()
	b.doubt = true
}

// DriftStats may be called at any time.
func (b *Backend) DriftStats() proxy.DriftStats {
	b.drift.Lock()
	defer b.drift.Unlock()
	return b.driftStats
}

package iptables

import (
	"sync"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Backend is the iptables mode of one address family. It implements
// proxy.Backend.
type Backend struct {
	cfg Config
	// lookEvery is what Watch waits between looks; tests shorten it.
	lookEvery time.Duration
	// sysctls is where they are; tests give another folder.
	sysctls string

	render   sync.Mutex // protects what follows
	memo     map[proxy.PortName]*unit
	memoNode proxy.Node
	// memoLarge says whether units were made without comments of endpoints.
	memoLarge bool
	walks     *proxy.WalkCache[walkKey]
	last      rendering

	apply   sync.Mutex // protects what follows
	flavour xtables.Flavour
	runner  *xtables.Runner // nil until the flavour is settled
	// applied is what the kernel is known to hold, nil if nothing is known.
	applied *program
	watch   *xtables.Watch // nil while nobody watches
	// lastFull is how long the last reading and comparing of all took.
	lastFull time.Duration
	reroute  rerouting

	drift proxy.DriftGate
}

var (
	_ proxy.Backend   = (*Backend)(nil)
	_ proxy.Forgetter = (*Backend)(nil)
	_ proxy.Watcher   = (*Backend)(nil)
)

// New returns a Backend that has not touched the kernel.
func New(cfg Config) *Backend {
	return &Backend{cfg: cfg.withDefaults(), lookEvery: lookEvery, sysctls: "/proc/sys"}
}

// Mode returns proxy.IPTables.
func (b *Backend) Mode() proxy.Mode { return proxy.IPTables }

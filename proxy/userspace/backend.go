package userspace

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Backend is the userspace mode in both address families. It implements
// proxy.Relay.
type Backend struct {
	cfg    Config
	noIPv6 atomic.Bool
	drift  proxy.DriftGate

	apply   sync.Mutex // protects what follows
	flavour xtables.Flavour
	kernel  map[xtables.Family]*kernel // nil until the flavour is settled
	closed  bool

	// listeners are changed by Apply alone.
	listenersMu sync.Mutex
	listeners   map[key]*listener

	ports     *ports
	budget    *semaphore.Weighted
	inUse     atomic.Int64 // of budget
	pipes     pipePool
	datagrams buffers
	notify    atomic.Pointer[func(*proxy.RelayEvent)]
	lastID    atomic.Uint64
	stats     stats
	said      limiter

	// conns are the open connections, to be closed in the end.
	connsMu sync.Mutex
	conns   map[*conn]struct{}
	wg      sync.WaitGroup
	ctx     context.Context // ends when nothing new is to begin
	stop    context.CancelFunc

	entries struct { // of connection tracking, for UDP
		sync.Mutex
		table *conntrack.Conn
		err   error
	}
}

var (
	_ proxy.Relay     = (*Backend)(nil)
	_ proxy.Forgetter = (*Backend)(nil)
	_ proxy.Watcher   = (*Backend)(nil)
)

// sweepEvery is how often clients whose affinity is over are forgotten.
const sweepEvery = time.Minute

// New returns a Backend that has not touched the kernel. What Apply begins,
// Run ends.
func New(cfg Config) *Backend {
	b := &Backend{
		cfg: cfg.withDefaults(), listeners: make(map[key]*listener), conns: make(map[*conn]struct{}),
	}
	b.ports = newPorts(b.cfg.Ports)
	b.budget = semaphore.NewWeighted(int64(b.cfg.MaxDescriptors))
	b.pipes.max = b.cfg.MaxDescriptors / 32 // two descriptors each, of those that are left
	b.ctx, b.stop = context.WithCancel(context.Background())
	return b
}

// Mode returns proxy.Userspace.
func (b *Backend) Mode() proxy.Mode { return proxy.Userspace }

// IPv6 reports whether the node has IPv6, as Preflight found.
func (b *Backend) IPv6() bool { return !b.noIPv6.Load() }

// Notify makes f learn what becomes of each connection.
func (b *Backend) Notify(f func(*proxy.RelayEvent)) {
	if f == nil {
		b.notify.Store(nil)
		return
	}
	b.notify.Store(&f)
}

func (b *Backend) tell(e *proxy.RelayEvent) {
	if f := b.notify.Load(); f != nil {
		e.Time = time.Now()
		(*f)(e)
	}
}

// inNetns runs f in the network namespace that is programmed.
func (b *Backend) inNetns(f func() error) error {
	if b.cfg.Tools.Netns == 0 {
		return f()
	}
	ns, err := netns.Open(fmt.Sprintf("/proc/self/fd/%d", b.cfg.Tools.Netns))
	if err != nil {
		return fmt.Errorf("proxy/userspace: %w", err)
	}
	defer ns.Close()
	return ns.Do(f)
}

// Run sweeps until ctx ends, which is no error. Then it accepts nothing more,
// lets connections end for Config.Drain, closes what is left, and returns when
// all is gone. After that Apply is an error.
func (b *Backend) Run(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for done := false; !done; {
		select {
		case <-ctx.Done():
			done = true
		case now := <-tick.C:
			b.eachListener(func(l *listener) { l.balance.tidy(now) })
		}
	}
	b.close()
	return nil
}

func (b *Backend) eachListener(f func(*listener)) {
	b.listenersMu.Lock()
	defer b.listenersMu.Unlock()
	for _, l := range b.listeners {
		f(l)
	}
}

// close drains and closes.
func (b *Backend) close() {
	b.apply.Lock()
	b.closed = true
	b.eachListener(func(l *listener) { l.close(proxy.EndedShutdown) })
	b.apply.Unlock()
	ended := make(chan struct{})
	go func() {
		b.wg.Wait()
		close(ended)
	}()
	if b.cfg.Drain > 0 {
		timer := time.NewTimer(b.cfg.Drain)
		defer timer.Stop()
		select {
		case <-ended:
		case <-timer.C:
		}
	}
	b.stop()
	b.connsMu.Lock()
	for c := range b.conns {
		c.shutdown()
	}
	b.connsMu.Unlock()
	<-ended
	b.pipes.close()
	b.entries.Lock()
	defer b.entries.Unlock()
	if b.entries.table != nil {
		_ = b.entries.table.Close()
		b.entries.table = nil
	}
}

// dial connects to an endpoint.
func (b *Backend) dial(network string, to netip.AddrPort, limit time.Duration) (c net.Conn, err error) {
	d := net.Dialer{Timeout: limit}
	d.SetMultipathTCP(false)
	err = b.inNetns(func() error {
		c, err = d.DialContext(b.ctx, network, to.String())
		return err
	})
	return c, err
}

// take takes n descriptors of the budget, waiting if must be.
func (b *Backend) take(n int64) bool {
	if !b.budget.TryAcquire(n) {
		b.stats.waits.Add(1)
		b.say("waiting for file descriptors: connections queue in the kernel; raise the limit (ulimit -n)", "limit", b.cfg.MaxDescriptors)
		if b.budget.Acquire(b.ctx, n) != nil {
			return false
		}
	}
	b.inUse.Add(n)
	return true
}

func (b *Backend) tryTake(n int64) bool {
	if !b.budget.TryAcquire(n) {
		return false
	}
	b.inUse.Add(n)
	return true
}

func (b *Backend) give(n int64) {
	b.inUse.Add(-n)
	b.budget.Release(n)
}

// say logs a warning that may be due very often, once in a while.
func (b *Backend) say(msg string, args ...any) {
	if unsaid, ok := b.said.allow(msg, time.Now()); ok {
		b.cfg.Logger.Warn(msg, append(args, "unsaid", unsaid)...)
	}
}

// limiter lets each message through once in a while.
type limiter struct {
	mu   sync.Mutex
	last map[string]time.Time
	held map[string]int
}

const sayEvery = 30 * time.Second

func (l *limiter) allow(msg string, now time.Time) (unsaid int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last == nil {
		l.last, l.held = make(map[string]time.Time), make(map[string]int)
	}
	if now.Sub(l.last[msg]) < sayEvery {
		l.held[msg]++
		return 0, false
	}
	unsaid = l.held[msg]
	l.last[msg], l.held[msg] = now, 0
	return unsaid, true
}

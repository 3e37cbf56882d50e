package serverhealth

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// Config says what a Checker looks at.
type Config struct {
	Policy Policy
	// View returns the state that is programmed now, nil before the first.
	View func() *proxy.View
	// SetOverlay takes what is out from now on, and returns when that is
	// programmed; Syncer.SetOverlay and Syncer.Synced do that.
	SetOverlay func(context.Context, proxy.Overlay)
	// Table is the kernel's table of connections; without one there are no
	// passive signs, and stuck connections stay.
	Table Table
	// Interval is how often each TCP endpoint is connected to (2 s if zero),
	// Timeout how long it may take (1 s), Rate how many are in a second at
	// most (200): more endpoints than that are asked less often.
	Interval, Timeout time.Duration
	Rate              int
	// Dial makes a TCP connection; nil means from where we are.
	Dial func(context.Context, netip.AddrPort) (net.Conn, error)
	// Changed is told what went out or came back. It must not wait.
	Changed func(Change)
	Logger  *slog.Logger
}

// Table is what a Checker needs of conntrack.Conn.
type Table interface {
	Dump(context.Context, func(conntrack.Flow) error) error
	Get(conntrack.Tuple) (conntrack.Flow, error)
	Delete(conntrack.Flow) error
}

// look is how often decisions are made.
const look = 250 * time.Millisecond

// tableShare bounds the time spent reading the table of connections: after each
// reading comes a pause of so many times as long, and at least a second.
const tableShare = 20

// parallel bounds our connections at one time.
const parallel = 64

// Checker keeps an Overlay of endpoints that do not answer.
type Checker struct {
	cfg Config

	mu      sync.Mutex // protects what follows
	machine *Machine
	out     map[netip.AddrPort]proxy.Outage
	stats   CheckerStats
	seen    *proxy.Snapshot
	order   []netip.AddrPort // TCP endpoints, to be asked in turn
	next    int
}

// CheckerStats says what a Checker did.
type CheckerStats struct {
	Stats
	// Probes counts our connections, Failed those that failed, Freed the
	// half-open connections of clients that were let go.
	Probes, Failed, Freed uint64
}

// NewChecker makes a Checker; Run starts it.
func NewChecker(cfg Config) *Checker {
	cfg.Interval, cfg.Timeout = cmp.Or(cfg.Interval, 2*time.Second), cmp.Or(cfg.Timeout, time.Second)
	cfg.Rate = cmp.Or(cfg.Rate, 200)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", addr.String())
		}
	}
	return &Checker{cfg: cfg, machine: NewMachine(cfg.Policy)}
}

// Stats may be called at any time.
func (c *Checker) Stats() CheckerStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.stats
	s.Stats = c.machine.Stats()
	return s
}

// Out returns what is out, with the reasons. It must not be changed.
func (c *Checker) Out() map[netip.AddrPort]proxy.Outage {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.out
}

// Run checks until ctx ends, which is no error. At the end nothing is out any
// more.
func (c *Checker) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { c.decide(ctx); return nil })
	g.Go(func() error { c.probe(ctx); return nil })
	if c.cfg.Table != nil {
		g.Go(func() error { c.watchTable(ctx); return nil })
	}
	return g.Wait()
}

// refresh takes over which endpoints there are. The caller holds mu.
func (c *Checker) refresh(v *proxy.View) {
	if v == nil || v.Snapshot == c.seen {
		return
	}
	c.seen = v.Snapshot
	var groups []Group
	tcp := map[netip.AddrPort]bool{}
	for i := range v.Snapshot.Services {
		s := &v.Snapshot.Services[i]
		sel := s.Select(v.Snapshot.Node, proxy.Overlay{})
		addrs := map[netip.AddrPort]bool{}
		for _, list := range [][]proxy.Endpoint{sel.Cluster, sel.Local} {
			for _, ep := range list {
				addrs[ep.Addr] = true
				if s.Name.Proto == conntrack.TCP {
					tcp[ep.Addr] = true
				}
			}
		}
		groups = append(groups, Group{s.Name, slices.Collect(maps.Keys(addrs))})
	}
	c.machine.SetGroups(groups)
	c.order = slices.SortedFunc(maps.Keys(tcp), netip.AddrPort.Compare)
}

// decide turns signs into outages.
func (c *Checker) decide(ctx context.Context) {
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		c.mu.Lock()
		c.refresh(c.cfg.View())
		o, changes := c.machine.Tick(time.Now())
		moved := slices.ContainsFunc(changes, func(ch Change) bool { return !ch.Kept })
		if moved || len(o.Out) != len(c.out) {
			c.out, moved = o.Out, true
		}
		c.mu.Unlock()
		if moved {
			c.cfg.SetOverlay(ctx, o)
		}
		gone := map[netip.AddrPort]bool{}
		for _, ch := range changes {
			if ch.Out {
				gone[ch.Endpoint] = true
			}
			if c.cfg.Changed != nil {
				c.cfg.Changed(ch)
			}
		}
		if len(gone) > 0 && c.cfg.Table != nil {
			c.free(ctx, gone)
		}
	}
}

// free removes half-open connections to endpoints that are out from the
// kernel's table, so that the clients' next SYN is a new connection. One that
// was answered meanwhile is left alone.
func (c *Checker) free(ctx context.Context, gone map[netip.AddrPort]bool) {
	var stuck []conntrack.Tuple
	err := c.cfg.Table.Dump(ctx, func(f conntrack.Flow) error {
		if f.State == conntrack.TCPSynSent && f.Status&conntrack.SeenReply == 0 && f.Orig.Dst() != f.Reply.Src() && gone[f.Reply.Src()] {
			stuck = append(stuck, f.Orig)
		}
		return nil
	})
	freed := uint64(0)
	for _, t := range stuck {
		f, get := c.cfg.Table.Get(t)
		if get != nil || f.State != conntrack.TCPSynSent || f.Status&conntrack.SeenReply != 0 || !gone[f.Reply.Src()] {
			continue
		}
		if c.cfg.Table.Delete(f) == nil {
			freed++
		}
	}
	c.mu.Lock()
	c.stats.Freed += freed
	c.mu.Unlock()
	if err != nil && ctx.Err() == nil {
		c.cfg.Logger.Warn("clients of an endpoint that is out may wait longer than they need to", "err", err)
	}
}

// probe connects to each TCP endpoint in turn.
func (c *Checker) probe(ctx context.Context) {
	var g errgroup.Group
	g.SetLimit(parallel)
	defer func() { _ = g.Wait() }()
	for ctx.Err() == nil {
		c.mu.Lock()
		c.refresh(c.cfg.View())
		n := len(c.order)
		var addr netip.AddrPort
		if n > 0 {
			c.next = (c.next + 1) % n
			addr = c.order[c.next]
		}
		c.mu.Unlock()
		if n > 0 {
			g.Go(func() error { c.connect(ctx, addr); return nil })
		}
		wait := max(c.cfg.Interval/time.Duration(max(n, 1)), time.Second/time.Duration(c.cfg.Rate))
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// connect makes one connection and closes it at once.
func (c *Checker) connect(ctx context.Context, addr netip.AddrPort) {
	within, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	defer cancel()
	conn, err := c.cfg.Dial(within, addr)
	if ctx.Err() != nil {
		if err == nil {
			_ = conn.Close()
		}
		return
	}
	sign := Answered
	switch {
	case err == nil:
		if t, ok := conn.(*net.TCPConn); ok {
			_ = t.SetLinger(0) // nothing is left behind on either side
		}
		_ = conn.Close()
	case errors.Is(err, syscall.ECONNREFUSED):
		sign = Refused
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.EADDRNOTAVAIL):
		return // that is our own trouble
	default:
		sign = Silent
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stats.Probes++
	if sign != Answered {
		c.stats.Failed++
	}
	c.machine.Note(addr, sign, time.Now())
}

// watchTable looks for signs of clients' connections.
func (c *Checker) watchTable(ctx context.Context) {
	t := &tableSigns{}
	for {
		start := time.Now()
		signs, err := t.read(ctx, c.cfg.Table)
		if err != nil && ctx.Err() == nil {
			c.cfg.Logger.Warn("no signs from clients' connections", "err", err)
		}
		c.mu.Lock()
		for _, s := range signs {
			c.machine.Note(s.endpoint, s.sign, start)
		}
		c.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-time.After(max(time.Second, tableShare*time.Since(start))):
		}
	}
}

// tableSigns finds what is new between two readings.
type tableSigns struct {
	// waiting are the unanswered connections of the last reading, told those
	// of which a sign was given.
	waiting, told map[conntrack.Tuple]bool
}

type tableSign struct {
	endpoint netip.AddrPort
	sign     Sign
}

func (t *tableSigns) read(ctx context.Context, table Table) ([]tableSign, error) {
	var signs []tableSign
	served := map[netip.AddrPort]bool{}
	waiting, told := map[conntrack.Tuple]bool{}, map[conntrack.Tuple]bool{}
	err := table.Dump(ctx, func(f conntrack.Flow) error {
		if f.Orig.Proto() != conntrack.TCP || f.Orig.Dst() == f.Reply.Src() { // to no Service
			return nil
		}
		ep := f.Reply.Src()
		switch {
		case f.State == conntrack.TCPSynSent && f.Status&conntrack.SeenReply == 0:
			waiting[f.Orig] = true
			if t.waiting[f.Orig] && !t.told[f.Orig] {
				signs = append(signs, tableSign{ep, StuckSYN})
			}
			if t.waiting[f.Orig] {
				told[f.Orig] = true
			}
		case f.State == conntrack.TCPClose && f.Status&conntrack.SeenReply != 0 && f.In.Packets == 1:
			// The reset is all that came back; without nf_conntrack_acct
			// nobody can tell.
			if !t.told[f.Orig] {
				signs = append(signs, tableSign{ep, ResetsSYN})
			}
			told[f.Orig] = true
		case f.Status&conntrack.Assured != 0 && f.State == conntrack.TCPEstablished && !t.told[f.Orig]:
			told[f.Orig] = true
			served[ep] = true
		case f.State == conntrack.TCPEstablished:
			told[f.Orig] = true
		}
		return nil
	})
	t.waiting, t.told = waiting, told
	// What failed counts before what worked: one that does both is alive.
	for ep := range served {
		signs = append(signs, tableSign{ep, Served})
	}
	return signs, err
}

package node

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

const (
	// driftLogEvery is how often repairs are spoken of, however many there are.
	driftLogEvery = time.Minute
	// upkeepAgain is the wait after a failure of what keeps the kernel right
	// between syncs.
	upkeepAgain = 5 * time.Second
)

// watch has the syncer repair what others change, until ctx ends.
func (n *node) watch(ctx context.Context) {
	w, ok := n.cfg.Backend.(proxy.Watcher)
	if !ok {
		return
	}
	var spoke time.Time
	unsaid := 0
	for ctx.Err() == nil {
		err := guard(func() error {
			return w.Watch(ctx, func(d proxy.Drift) {
				if d.Certain {
					n.gap.begin(time.Now().Add(-looksEvery))
				}
				n.syncer.Resync()
				if time.Since(spoke) < driftLogEvery {
					unsaid++
					return
				}
				if d.Certain {
					n.cfg.Logger.Warn("others changed our rules; repairing", "what", d.What, "unsaid", unsaid)
				} else {
					n.cfg.Logger.Info("others may have changed our rules; comparing", "what", d.What, "unsaid", unsaid)
				}
				spoke, unsaid = time.Now(), 0
			})
		})()
		if err == nil {
			return
		}
		n.cfg.Logger.Error("changes by others are not seen, but for an hourly look; trying again", "in", upkeepAgain, "err", err)
		pause(ctx, upkeepAgain)
	}
}

// looksEvery is how often a Backend looks whether others wrote to its rules.
const looksEvery = time.Second

// gap is a time in which rules that report may not be there.
type gap struct {
	mu   sync.Mutex
	from time.Time // zero for none
}

func (g *gap) begin(at time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.from.IsZero() {
		g.from = at
	}
}

func (g *gap) end() (from time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	from, g.from = g.from, time.Time{}
	return from
}

// restored counts a loss if a sync brought back rules that report.
func (n *node) restored(r proxy.Report, failed bool) {
	if failed || n.tracer == nil {
		return
	}
	from := n.gap.end()
	if r.Restored > 0 {
		n.cfg.Logger.Warn("others removed rules of ours that report; they are back", "rules", r.Restored, "gone for at most", time.Since(r.Intact).Round(time.Millisecond))
		from = r.Intact
	}
	if !from.IsZero() {
		n.tracer.losses.add(trace.Loss{Source: trace.NFLog, From: from.UnixNano(), To: time.Now().UnixNano(), Events: 1, Where: "rules"})
	}
}

// follow keeps up with what another proxy programs, until ctx ends.
func (n *node) follow(ctx context.Context, f proxy.Follower) {
	for ctx.Err() == nil {
		err := guard(func() error { return f.Follow(ctx, n.syncer.Resync) })()
		if ctx.Err() != nil {
			return
		}
		n.cfg.Logger.Error("changes of the rules are not seen; trying again", "in", upkeepAgain, "err", err)
		pause(ctx, upkeepAgain)
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// removeOthers removes what other modes left, once the rules of this one are
// there, so that Services are served at any moment.
func (n *node) removeOthers(ctx context.Context) {
	if n.cfg.Others == nil {
		return
	}
	for ctx.Err() == nil {
		synced := n.syncer.Synced()
		if v := n.view(); v != nil && v.Err == nil {
			if err := n.cfg.Others.Cleanup(ctx); err != nil && ctx.Err() == nil {
				n.cfg.Logger.Warn("rules of another mode may be left; kptrace cleanup removes them", "err", err)
			}
			return
		}
		select {
		case <-ctx.Done():
		case <-synced:
		}
	}
}

// reconcile moves UDP clients on whenever endpoints changed, until ctx ends.
func (n *node) reconcile(ctx context.Context) {
	for ctx.Err() == nil {
		err := guard(func() error { return n.reconcileTable(ctx) })()
		if ctx.Err() != nil {
			return
		}
		n.cfg.Logger.Error("UDP clients may stick to endpoints that are gone; trying again", "in", upkeepAgain, "err", err)
		pause(ctx, upkeepAgain)
	}
}

func (n *node) reconcileTable(ctx context.Context) error {
	table, err := conntrack.Open(conntrack.Config{})
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	defer table.Close()
	r := conntrack.NewReconciler(conntrack.ReconcilerConfig{Table: table, Local: localAddrs, Observe: n.cfg.Reconciled})
	again := time.NewTimer(0)
	again.Stop()
	defer again.Stop()
	for ctx.Err() == nil {
		synced := n.syncer.Synced()
		if v := n.view(); v != nil {
			if err := r.Reconcile(ctx, n.udpFrontends(v.Snapshot)); err != nil && ctx.Err() == nil {
				n.cfg.Logger.Warn("not all UDP clients could be moved on; trying again", "in", upkeepAgain, "err", err)
				again.Reset(upkeepAgain)
			}
			if v.Err != nil { // rules that fail may still send clients astray
				r.Doubt()
			}
		}
		select {
		case <-ctx.Done():
		case <-synced:
		case <-again.C:
		}
	}
	return nil
}

// udpFrontends are where the kernel leads UDP clients in this mode.
func (n *node) udpFrontends(s *proxy.Snapshot) conntrack.Frontends {
	if r, ok := n.cfg.Backend.(proxy.Relay); ok {
		return r.UDPFrontends(s)
	}
	return s.UDPFrontends()
}

// localAddrs tells the addresses of this network namespace.
func localAddrs() (func(netip.Addr) bool, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	ours := make(map[netip.Addr]bool, len(list))
	for _, a := range list {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			ours[p.Addr()] = true
		}
	}
	return func(a netip.Addr) bool { return a.IsLoopback() || ours[a] }, nil
}

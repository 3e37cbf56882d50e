package ipvs

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// How often Watch looks. The kernel announces no change of IPVS, so looking is
// all there is: a list of virtual servers and of addresses costs 1 ms a thousand.
const (
	drainEvery = time.Second
	lookEvery  = 5 * time.Second
	rulesEvery = 30 * time.Second
	// drainAtOnce bounds the virtual servers of which one look reads the real
	// servers.
	drainAtOnce = 200
	// holdLeast and holdMost are the waits between two repairs of what somebody
	// changes again and again.
	holdLeast = 5 * time.Second
	holdMost  = 5 * time.Minute
)

// Watch removes real servers that are done with (see Config.GracePeriod), and
// looks whether others changed virtual servers, addresses, sets or rules of ours,
// or the node's addresses changed, which serve node ports.
func (b *Backend) Watch(ctx context.Context, changed func(proxy.Drift)) error {
	tick := time.NewTicker(drainEvery)
	defer tick.Stop()
	w := &watching{b: b, looked: time.Now(), read: time.Now()}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := b.Drain(); err != nil {
			b.cfg.Logger.Warn("endpoints that are gone keep their place in IPVS for now", "err", err)
		}
		d, err := w.look(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("proxy/ipvs: looking for changes by others: %w", err)
		}
		if d.What != "" && b.note(d, w.pass()) {
			changed(d)
		}
	}
}

// note counts a drift and reports whether to act on it.
func (b *Backend) note(d proxy.Drift, act bool) bool {
	b.drift.Lock()
	defer b.drift.Unlock()
	if !act {
		b.driftStats.Held++
		return false
	}
	if d.Certain {
		b.driftStats.Certain++
	} else {
		b.driftStats.Doubts++
	}
	b.driftStats.Last, b.driftStats.LastWhat = time.Now(), d.What
	return true
}

// watching is one Watch.
type watching struct {
	b            *Backend
	looked, read time.Time
	acted        time.Time
	hold         time.Duration
}

// pass reports whether the last repair is long enough ago.
func (w *watching) pass() bool {
	since := time.Since(w.acted)
	if since < w.hold {
		return false
	}
	w.hold = min(max(2*w.hold, holdLeast), holdMost)
	if since > 2*holdMost {
		w.hold = holdLeast
	}
	w.acted = time.Now()
	return true
}

// look compares what is cheap to compare with what was written last.
func (w *watching) look(ctx context.Context) (proxy.Drift, error) {
	if time.Since(w.looked) < lookEvery {
		return proxy.Drift{}, nil
	}
	b := w.b
	b.apply.Lock()
	defer b.apply.Unlock()
	w.looked = time.Now()
	h, p := b.applied, b.last
	if h == nil || p == nil {
		return proxy.Drift{}, nil // the next sync looks at everything
	}
	var d proxy.Drift
	err := b.withKernel(func(k *kernel) error {
		for _, f := range p.families {
			if b.cfg.NodePorts.LocalAddrs == nil {
				break
			}
			all := proxy.NodePortConfig{LocalAddrs: b.cfg.NodePorts.LocalAddrs}
			if now := all.Addrs(&p.node, f.ip6, true); !slices.Equal(now, f.local) {
				d = proxy.Drift{What: "the node's addresses changed"}
				return nil
			}
		}
		what, err := b.missing(k, h)
		d = proxy.Drift{Certain: what != "", What: what}
		return err
	})
	if err != nil || d.What != "" || time.Since(w.read) < rulesEvery {
		return d, err
	}
	w.read = time.Now()
	for i, f := range p.families {
		if i >= len(b.runners) {
			break
		}
		have, err := b.runners[i].Save(ctx, "")
		if err != nil {
			return d, err
		}
		if plan := f.layout.Plan(have, nil); len(plan) > 0 {
			return proxy.Drift{Certain: true, What: "chains of table " + plan[0].Units[0].Table + " differ"}, nil
		}
	}
	return d, nil
}

// missing says what virtual servers, addresses or sets of ours others changed.
func (b *Backend) missing(k *kernel, h *held) (string, error) {
	services, err := k.virtualServers()
	if err != nil {
		return "", err
	}
	there := make(map[key]settings, len(services))
	for _, s := range services {
		there[s.key] = s.settings
	}
	for at, v := range h.virtuals {
		set, ok := there[at]
		switch {
		case v.foreign || v.draining:
		case !ok:
			return "virtual server " + at.String() + " is gone", nil
		case set != v.settings:
			return "virtual server " + at.String() + " was changed", nil
		}
	}
	now := newHeld()
	if err := k.readAddrs(now); err != nil {
		return "", err
	}
	for ip := range h.bound {
		if now.bound[ip] == nil {
			return ip.String() + " is gone from " + Device, nil
		}
	}
	if what, err := otherServers(h); what != "" || err != nil {
		return what, err
	}
	return otherSets(h, b.withFamilies())
}

// Drain removes the real servers that leave and have no connections any more, or
// whose time is up, and virtual servers that were there for them alone. Watch
// calls it once a second.
func (b *Backend) Drain() error {
	b.apply.Lock()
	defer b.apply.Unlock()
	h := b.applied
	if h == nil {
		return nil
	}
	leavers := h.leavers()
	if len(leavers) == 0 {
		return nil
	}
	if len(leavers) > drainAtOnce {
		leavers = leavers[:drainAtOnce]
	}
	err := b.withKernel(func(k *kernel) error {
		ops, err := k.drained(leavers, time.Now())
		if err != nil {
			return err
		}
		a := &applying{b: b, k: k, failed: map[*unit]error{}}
		if err := k.ensureDevice(); err != nil {
			return err
		}
		if err := a.do(h, ops); err != nil {
			return err
		}
		if err := a.do(h, h.unneeded()); err != nil {
			return err
		}
		return errors.Join(a.others...)
	})
	if err != nil {
		b.applied = nil // look at everything at the next sync
		return fmt.Errorf("proxy/ipvs: ending graceful termination: %w", err)
	}
	return nil
}

// drained lists what can go of virtual servers that have real servers leaving.
func (k *kernel) drained(leavers []*heldVirtual, now time.Time) ([]op, error) {
	var ops []op
	for _, v := range leavers {
		list, err := k.realServers(v.key)
		if err != nil {
			return nil, err
		}
		busy := map[netip.AddrPort]bool{}
		for _, r := range list {
			busy[r.addr] = r.busy
		}
		left := 0
		for addr, r := range v.reals {
			if !r.leaving.IsZero() && (!busy[addr] || now.After(r.leaving)) {
				ops = append(ops, op{kind: delReal, key: v.key, real: real{addr: addr}})
				continue
			}
			left++
		}
		if v.draining && left == 0 {
			ops = append(ops, op{kind: delVirtual, key: v.key})
		}
	}
	return ops, nil
}

// staleChain reports whether a chain is one that another mode or an earlier run
// left and that is ours to remove.
func staleChain(table, chain string) bool {
	return isOurs(table, chain) || xtables.IsKubeProxy(chain) || chain == "KUBE-PROXY-CANARY"
}

package beside

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
)

// readShare is how much rarer than it takes the rules are read: a large ruleset
// takes seconds.
const readShare = 10

// Follow reads the rules again whenever somebody changed them, and calls changed
// when they mean something else, until ctx ends, which is no error. Tables of
// nf_tables announce changes; legacy tables are watched as xtables.Watch says.
func (b *Backend) Follow(ctx context.Context, changed func()) error {
	watches, err := b.watches()
	defer func() {
		for _, w := range watches {
			_ = w.Close()
		}
	}()
	if err != nil {
		return fmt.Errorf("proxy/beside: %w", err)
	}
	tick := time.NewTicker(b.cfg.LookEvery)
	defer tick.Stop()
	addrs := b.cfg.LocalAddrs()
	var notBefore time.Time
	suspect := true // what was read before the watches were there
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		for _, w := range watches {
			suspect = suspect || w.Look().Suspicion != xtables.Quiet
		}
		if now := b.cfg.LocalAddrs(); !slices.Equal(now, addrs) {
			addrs, suspect = now, true
		}
		if !suspect {
			b.intact.Store(time.Now().UnixNano())
		}
		if !suspect || time.Now().Before(notBefore) {
			continue
		}
		start := time.Now()
		for _, w := range watches {
			w.Pause(true)
		}
		s, err := b.look(ctx)
		for _, w := range watches {
			w.Settle(0)
		}
		if ctx.Err() != nil {
			return nil
		}
		notBefore = time.Now().Add(max(b.cfg.LookEvery, readShare*time.Since(start)))
		if err != nil {
			b.cfg.Logger.Error("the rules cannot be read; what is shown may be out of date", "err", err)
			continue
		}
		suspect = false
		old := b.seen.Swap(s)
		if old.found != s.found {
			b.cfg.Logger.Warn("what this watches changed", "from", old.found, "to", s.found)
		}
		changed()
	}
}

// watches watch the tables that a kube-proxy keeps, and ours. That of one in nftables
// mode is watched beside legacy tables too, where the kernel has nf_tables.
func (b *Backend) watches() ([]*xtables.Watch, error) {
	var all []*xtables.Watch
	add := func(fl xtables.Flavour, fa xtables.Family, tables ...string) error {
		w, err := xtables.OpenWatch(xtables.WatchConfig{
			Flavour: fl, Family: fa, Netns: b.cfg.Tools.Netns, LockFile: b.cfg.Tools.LockFile(), Tables: tables,
			Ours:    func(string, string) bool { return true },
			Targets: []string{""},
		})
		if err != nil {
			return err
		}
		w.Pause(true)
		w.Settle(0)
		all = append(all, w)
		return nil
	}
	for _, fa := range b.seen.Load().families {
		tables := []string{"mangle", "nat", "filter"}
		if b.flavour == xtables.NFT {
			tables = append(tables, "kube-proxy")
		} else {
			_ = add(xtables.NFT, fa, "kube-proxy") // without nf_tables nothing can come of it
		}
		if err := add(b.flavour, fa, tables...); err != nil {
			return all, err
		}
	}
	return all, nil
}

package xtables

import (
	"fmt"
	"time"

	"github.com/kptrace/kptrace/internal/netns"
)

// Watch tells when others write to tables that we keep, without reading the
// tables: nf_tables announces each change, and counts its commits, so that what
// happened while we were writing ourselves is known as well. Of legacy tables
// the kernel tells the number of entries and the size, which is looked at each
// time. A change of neither is found in one of two ways. Where a table is large
// and root may read /proc/vmallocinfo, the kernel's list of memory areas says
// where the table is, and one that was written is elsewhere. Of others the content
// is looked at, within 3 s where somebody used the lock of iptables, else as often
// as that takes no more than a hundredth of the time.
//
// The owner calls Pause before it reads or writes the tables and Settle after,
// and Look in between as often as it likes; one call at a time.
type Watch struct {
	cfg  WatchConfig
	seen Sight
	side interface {
		pause(*Sight) error
		settle(*Sight, int) error
		look(*Sight) error
		aside(f func())
		close() error
	}
}

// OpenWatch starts watching. It needs CAP_NET_ADMIN in the namespace. Until
// the first Settle nothing is said.
func OpenWatch(cfg WatchConfig) (*Watch, error) {
	w := &Watch{cfg: cfg}
	open := func() (err error) {
		if cfg.Flavour == NFT {
			w.side, err = openNFTWatch(&w.cfg)
		} else {
			w.side, err = openLegacyWatch(&w.cfg)
		}
		return err
	}
	var err error
	if cfg.Netns == 0 {
		err = open()
	} else {
		var ns *netns.NS
		if ns, err = netns.Open(fmt.Sprintf("/proc/self/fd/%d", cfg.Netns)); err == nil {
			err = ns.Do(open)
			ns.Close()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("xtables: watching %s tables: %w", cfg.Flavour, err)
	}
	return w, nil
}

// Close ends the watch.
func (w *Watch) Close() error { return w.side.close() }

// Pause says that we are about to read or write. With all, we are about to
// compare whole tables, so what was seen before does not matter any more.
func (w *Watch) Pause(all bool) {
	if err := w.side.pause(&w.seen); err != nil {
		w.seen.note(Doubt, err.Error())
	}
	if all {
		w.seen = Sight{}
	}
}

// Settle says that we are done and how many commits were ours.
func (w *Watch) Settle(commits int) {
	if err := w.side.settle(&w.seen, commits); err != nil {
		w.seen.note(Doubt, err.Error())
	}
}

// Aside runs f, which writes tables of ours that another Watch looks at.
func (w *Watch) Aside(f func()) { w.side.aside(f) }

// Look returns what was seen since whole tables were compared last.
func (w *Watch) Look() Sight {
	if err := w.side.look(&w.seen); err != nil {
		w.seen.note(Doubt, err.Error())
	}
	return w.seen
}

// contentShare is how much rarer than it takes the content of legacy tables is
// looked at, and contentEvery the least time in between; contentSoon is the
// longest wait where somebody used the lock of iptables.
const (
	contentShare = 100
	contentEvery = time.Second
	contentSoon  = 3 * time.Second
	// smallTables is the size in bytes up to which reading tables takes
	// milliseconds. Larger ones are more than the kernel gives out in one piece
	// (order 10), and so are in its list of areas.
	smallTables = 4 << 20
)

// lockFile is the lock of iptables-legacy (xshared.h).
func (c *WatchConfig) lockFile() string {
	if c.LockFile != "" {
		return c.LockFile
	}
	return "/run/xtables.lock"
}

package selection

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/xtables"
)

// Selection is what is traced in the calling thread's network namespace. It has
// one user at a time.
type Selection struct {
	cfg Config
	// packets is what the rules in the kernel were written for, 0 for none.
	packets int
	now     Want
	// early are the copies of our rules before the table raw, and late says of which
	// families there is none, and why.
	early map[xtables.Family]*xtables.Early
	late  map[xtables.Family]error
	// lacked are the families without a table raw before us.
	lacked []xtables.Family
}

// New returns a Selection. It changes nothing.
func New(cfg Config) *Selection {
	return &Selection{cfg: cfg.withDefaults(), early: map[xtables.Family]*xtables.Early{}, late: map[xtables.Family]error{}}
}

func (s *Selection) families() []xtables.Family {
	if s.cfg.IPv6 {
		return []xtables.Family{xtables.IPv4, xtables.IPv6}
	}
	return []xtables.Family{xtables.IPv4}
}

func suffix(fa xtables.Family) string {
	if fa == xtables.IPv6 {
		return "6"
	}
	return "4"
}

// Set makes w what is traced, and refreshes its entries: it has to be called
// again within Config.Timeout. It needs CAP_NET_ADMIN in the namespace, ipset in
// the kernel, and the iptables matches set, limit, and hashlimit for other
// protocols than TCP.
func (s *Selection) Set(ctx context.Context, w Want) error {
	if s.packets == 0 {
		// What somebody left who died.
		if err := Reap(ctx, s.cfg.Tools); err != nil {
			return err
		}
	}
	for _, fa := range s.families() {
		for _, set := range []struct {
			name    string
			entries []Entry
			before  []Entry
		}{{setTo + suffix(fa), w.To, s.now.To}, {setFrom + suffix(fa), w.From, s.now.From}} {
			if s.packets == 0 {
				if err := s.create(set.name, fa); err != nil {
					return err
				}
			}
			if err := s.fill(set.name, fa, set.entries, set.before); err != nil {
				return err
			}
		}
	}
	s.now = w
	if s.packets == w.Packets {
		return nil
	}
	for _, fa := range s.families() {
		if err := s.write(ctx, fa, w.Packets); err != nil {
			return err
		}
	}
	s.packets = w.Packets
	return nil
}

func (s *Selection) create(name string, fa xtables.Family) error {
	family := uint8(unix.AF_INET)
	if fa == xtables.IPv6 {
		family = unix.AF_INET6
	}
	timeout := uint32(s.cfg.Timeout / time.Second)
	err := netlink.IpsetCreate(name, "hash:ip,port", netlink.IpsetCreateOptions{
		Family: family, Timeout: &timeout, MaxElements: maxEntries, Replace: true,
	})
	if err != nil {
		return fmt.Errorf("selection: making the set %s (needs CAP_NET_ADMIN and ipset in the kernel): %w", name, err)
	}
	return nil
}

// fill refreshes entries and removes those of before that are not wanted.
func (s *Selection) fill(name string, fa xtables.Family, want, before []Entry) error {
	timeout := uint32(s.cfg.Timeout / time.Second)
	for _, e := range want {
		if e.Addr.Addr().Is6() != (fa == xtables.IPv6) {
			continue
		}
		if err := netlink.IpsetAdd(name, entry(e, &timeout)); err != nil {
			return fmt.Errorf("selection: adding %s %s to the set %s: %w", e.Proto, e.Addr, name, err)
		}
	}
	for _, e := range before {
		if _, still := slices.BinarySearchFunc(want, e, compare); !still && e.Addr.Addr().Is6() == (fa == xtables.IPv6) {
			_ = netlink.IpsetDel(name, entry(e, nil)) // it may have timed out
		}
	}
	return nil
}

func entry(e Entry, timeout *uint32) *netlink.IPSetEntry {
	proto, port := uint8(e.Proto), e.Addr.Port()
	return &netlink.IPSetEntry{
		IP: net.IP(e.Addr.Addr().AsSlice()), Protocol: &proto, Port: &port, Timeout: timeout, Replace: true,
	}
}

// write puts the rules into the kernel in one commit.
func (s *Selection) write(ctx context.Context, fa xtables.Family, packets int) error {
	have, err := s.cfg.Tools.Save(ctx, s.cfg.Flavour, fa, "", false)
	if err != nil {
		return fmt.Errorf("selection: %w", err)
	}
	if have.Table("raw") == nil {
		s.lacked = append(s.lacked, fa)
	}
	body, jumps := rules(suffix(fa), packets, s.cfg.Rate, s.cfg.Burst)
	unit := xtables.Unit{Table: "raw", Owner: "path tracing", Lines: append([]string{":" + chain + " - [0:0]"}, unjump(have)...)}
	for _, r := range body {
		unit.Lines = append(unit.Lines, "-A "+chain+" "+r)
	}
	for _, from := range [...]string{"PREROUTING", "OUTPUT"} {
		for _, r := range jumps {
			unit.Lines = append(unit.Lines, "-I "+from+" "+r)
		}
	}
	if err := apply(ctx, s.cfg.Tools, s.cfg.Flavour, fa, unit); err != nil {
		return err
	}
	s.raise(fa)
	return nil
}

// raise has tracing begin before the table raw, where the kernel can do that, so that
// rules which others put before our jumps are seen.
func (s *Selection) raise(fa xtables.Family) {
	if s.cfg.Flavour != xtables.NFT {
		return
	}
	_ = s.early[fa].Close() // of other rules
	s.early[fa], s.late[fa] = xtables.CopyEarly(fa, chain)
}

// Late says why tracing begins at our rules in raw only, nil if it begins before.
func (s *Selection) Late() error {
	return errors.Join(s.late[xtables.IPv4], s.late[xtables.IPv6])
}

// unjump lists the lines that remove all jumps to our chain.
func unjump(have *xtables.Ruleset) []string {
	var lines []string
	t := have.Table("raw")
	if t == nil {
		return nil
	}
	for _, c := range t.Chains {
		for _, r := range c.Rules {
			if r.Target == chain {
				lines = append(lines, "-D "+c.Name+" "+r.String())
			}
		}
	}
	return lines
}

func apply(ctx context.Context, tools xtables.Tools, fl xtables.Flavour, fa xtables.Family, unit xtables.Unit) error {
	runner := xtables.NewRunner(xtables.RunnerConfig{Tools: tools, Flavour: fl, Family: fa})
	rep, err := runner.Apply(ctx, xtables.Plan{{Name: "paths", Units: []xtables.Unit{unit}}})
	if err != nil {
		return fmt.Errorf("selection: %w", err)
	}
	if len(rep.Failed) > 0 {
		return fmt.Errorf("selection: %w", &rep.Failed[0])
	}
	return nil
}

// Counters returns how many packets the sets selected since the rules were
// written, and how many of these were traced; the others were too many a second,
// or later ones of a connection than asked for.
func (s *Selection) Counters(ctx context.Context) (selected, traced uint64, err error) {
	for _, fa := range s.families() {
		have, err := s.cfg.Tools.Save(ctx, s.cfg.Flavour, fa, "raw", true)
		if err != nil {
			return 0, 0, fmt.Errorf("selection: %w", err)
		}
		t := have.Table("raw")
		if t == nil {
			continue
		}
		for _, c := range t.Chains {
			for _, r := range c.Rules {
				switch {
				case r.Target == chain:
					selected += r.Counters.Packets
				case c.Name == chain && r.Target == "TRACE":
					traced += r.Counters.Packets
				}
			}
		}
	}
	return selected, traced, nil
}

// Stop ends tracing at once and leaves the rules, whose counters can still be
// read; Close removes them.
func (s *Selection) Stop() error {
	var errs []error
	if s.packets != 0 {
		for _, fa := range s.families() {
			for _, name := range []string{setTo, setFrom} {
				if err := netlink.IpsetFlush(name + suffix(fa)); err != nil {
					errs = append(errs, fmt.Errorf("selection: emptying the set %s: %w", name+suffix(fa), err))
				}
			}
		}
	}
	s.now = Want{}
	return errors.Join(errs...)
}

// Close removes rules and sets.
func (s *Selection) Close(ctx context.Context) error {
	var errs []error
	for _, e := range s.early {
		errs = append(errs, e.Close())
	}
	clear(s.early)
	clear(s.late)
	for _, fa := range s.families() {
		errs = append(errs, remove(ctx, s.cfg.Tools, s.cfg.Flavour, fa, slices.Contains(s.lacked, fa)))
	}
	errs = append(errs, removeSets())
	s.packets, s.now, s.lacked = 0, Want{}, nil
	return errors.Join(errs...)
}

// Reap removes what a Selection left in either flavour whose owner died. An
// absent program, or a flavour that cannot be read, has nothing of ours.
func Reap(ctx context.Context, tools xtables.Tools) error {
	if !setsLeft() {
		return nil // sets are made first and removed last
	}
	var errs []error
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		for _, fa := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
			errs = append(errs, remove(ctx, tools, fl, fa, true))
		}
	}
	errs = append(errs, removeSets())
	return errors.Join(errs...)
}

// remove removes the rules of one family and, if asked to, the table they stood
// in where nothing else is in it; iptables-legacy cannot do that.
func remove(ctx context.Context, tools xtables.Tools, fl xtables.Flavour, fa xtables.Family, table bool) error {
	have, err := tools.Save(ctx, fl, fa, "", false)
	if err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("selection: %w", err)
		}
		return nil
	}
	t := have.Table("raw")
	if t == nil {
		return nil
	}
	if t.Chain(chain) != nil {
		unit := xtables.Unit{Table: "raw", Owner: "path tracing", Lines: append([]string{":" + chain + " - [0:0]"}, unjump(have)...)}
		unit.Lines = append(unit.Lines, "-X "+chain)
		if err := apply(ctx, tools, fl, fa, unit); err != nil {
			return err
		}
	}
	if table && fl == xtables.NFT {
		if _, err := xtables.RemoveEmptyTable(fa, "raw"); err != nil {
			return fmt.Errorf("selection: %w", err)
		}
	}
	return nil
}

func setNames() []string {
	return []string{setTo + "4", setFrom + "4", setTo + "6", setFrom + "6"}
}

// setsLeft reports whether one of our sets is there, or that cannot be told.
func setsLeft() bool {
	for _, name := range setNames() {
		if _, err := netlink.IpsetList(name); err == nil || !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
			return true
		}
	}
	return false
}

// removeSets destroys our sets. The kernel lets go of a set that a rule used a
// moment after the rule is gone.
func removeSets() error {
	var errs []error
	for _, name := range setNames() {
		err := netlink.IpsetDestroy(name)
		for try := 0; errors.Is(err, nl.IPSetError(nl.IPSET_ERR_BUSY)) && try < 100; try++ {
			time.Sleep(20 * time.Millisecond)
			err = netlink.IpsetDestroy(name)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("selection: removing the set %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

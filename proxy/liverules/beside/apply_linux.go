package beside

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/dataplane"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Apply brings our own sets and chains to p: sets first, for the chains look into
// them. It touches nothing else.
func (b *Backend) Apply(ctx context.Context, prog proxy.Program) (proxy.Report, error) {
	start := time.Now()
	p, ok := prog.(*program)
	if !ok {
		return proxy.Report{}, fmt.Errorf("proxy/beside: applying: %T is a program of another mode", prog)
	}
	b.apply.Lock()
	defer b.apply.Unlock()
	var rep proxy.Report
	err := b.write(ctx, p, &rep)
	rep.Took = time.Since(start)
	if err != nil {
		b.held = nil
		return rep, fmt.Errorf("proxy/beside: applying: %w", err)
	}
	return rep, nil
}

func (b *Backend) write(ctx context.Context, p *program, rep *proxy.Report) error {
	if b.cfg.ReadOnly {
		return nil
	}
	if b.held == nil {
		rep.Full = true
		held, err := b.readSets(p.layouts)
		if err != nil {
			return err
		}
		b.held = held
	}
	for m := range p.members {
		if b.held[m] {
			continue
		}
		if err := netlink.IpsetAdd(m.set, entry(m)); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("adding %s to the set %s: %w", m, m.set, err)
		}
		b.held[m] = true
		rep.Rules++
	}
	for i := range p.layouts {
		l := &p.layouts[i]
		runner := b.runner(l.Family)
		have, err := runner.Save(ctx, "mangle")
		if err != nil {
			return err
		}
		plan := l.Plan(have, nil)
		if len(plan) == 0 {
			continue
		}
		did, err := runner.Apply(ctx, plan)
		rep.Commits += did.Commits
		rep.Rules += did.Rules
		rep.Bytes += did.Bytes
		if err != nil {
			return err
		}
		for j := range did.Failed {
			return &did.Failed[j]
		}
		if mode, again := b.wrote[l.Family]; again && (mode == proxy.IPVS) == (p.mode == proxy.IPVS) {
			rep.Restored += did.Rules
		}
	}
	if rep.Intact = time.Unix(0, b.intact.Load()); b.wrote == nil {
		b.wrote = make(map[xtables.Family]proxy.Mode)
	}
	for i := range p.layouts {
		b.wrote[p.layouts[i].Family] = p.mode
	}
	b.intact.Store(time.Now().UnixNano())
	for m := range b.held {
		if p.members[m] {
			continue
		}
		if err := netlink.IpsetDel(m.set, entry(m)); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("removing %s from the set %s: %w", m, m.set, err)
		}
		delete(b.held, m)
	}
	return nil
}

func (b *Backend) runner(fa xtables.Family) *xtables.Runner {
	return xtables.NewRunner(xtables.RunnerConfig{Tools: b.cfg.Tools, Flavour: b.flavour, Family: fa})
}

// readSets makes our sets where they are not there, and reads them.
func (b *Backend) readSets(layouts []xtables.Layout) (map[member]bool, error) {
	held := map[member]bool{}
	for i := range layouts {
		family := uint8(unix.AF_INET)
		if layouts[i].Family == xtables.IPv6 {
			family = unix.AF_INET6
		}
		for _, base := range []string{setVirtual, setReal} {
			name := setName(base, family == unix.AF_INET6)
			err := netlink.IpsetCreate(name, "hash:ip,port", netlink.IpsetCreateOptions{Family: family, MaxElements: b.cfg.MaxElements})
			if err != nil && !errors.Is(err, nl.IPSetError(nl.IPSET_ERR_EXIST_SETNAME2)) && !errors.Is(err, unix.EEXIST) {
				return nil, fmt.Errorf("making the set %s (needs CAP_NET_ADMIN and the module ip_set_hash_ipport): %w", name, err)
			}
			set, err := netlink.IpsetList(name)
			if err != nil {
				return nil, fmt.Errorf("reading the set %s: %w", name, err)
			}
			for j := range set.Entries {
				held[read(name, &set.Entries[j])] = true
			}
		}
	}
	return held, nil
}

func entry(m member) *netlink.IPSetEntry {
	proto, port := uint8(m.proto), m.addr.Port()
	return &netlink.IPSetEntry{IP: m.addr.Addr().AsSlice(), Protocol: &proto, Port: &port}
}

func read(set string, e *netlink.IPSetEntry) member {
	m := member{set: set}
	if e.Protocol != nil {
		m.proto = conntrack.Proto(*e.Protocol)
	}
	var port uint16
	if e.Port != nil {
		port = *e.Port
	}
	if a, ok := netip.AddrFromSlice(e.IP); ok {
		m.addr = netip.AddrPortFrom(a.Unmap(), port)
	}
	return m
}

// Cleanup removes our own chains, in both flavours, and our sets.
func (b *Backend) Cleanup(ctx context.Context) error {
	b.apply.Lock()
	defer b.apply.Unlock()
	b.held = nil
	var errs []error
	for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		for _, fa := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
			runner := xtables.NewRunner(xtables.RunnerConfig{Tools: b.cfg.Tools, Flavour: fl, Family: fa})
			have, err := runner.Save(ctx, "mangle")
			if err != nil {
				continue // without the flavour there is nothing of ours in it
			}
			plan, stays := xtables.Removal(have, isOurs)
			errs = append(errs, stays...)
			if len(plan) == 0 {
				continue
			}
			did, err := runner.Apply(ctx, plan)
			errs = append(errs, err)
			for i := range did.Failed {
				errs = append(errs, &did.Failed[i])
			}
			// iptables-legacy cannot remove a table.
			if fl == xtables.NFT && !b.mangle[fa] && len(did.Failed) == 0 {
				_, err := xtables.RemoveEmptyTable(fa, "mangle")
				errs = append(errs, err)
			}
		}
	}
	for _, base := range []string{setVirtual, setReal} {
		for _, ip6 := range []bool{false, true} {
			errs = append(errs, destroy(ctx, setName(base, ip6)))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("proxy/beside: cleaning up: %w", err)
	}
	return nil
}

// destroy removes a set. The kernel lets go of one that a rule used a moment after
// the rule is gone.
func destroy(ctx context.Context, name string) error {
	for try := 0; ; try++ {
		err := netlink.IpsetDestroy(name)
		switch {
		case err == nil, errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINVAL):
			return nil // EINVAL: a kernel without ipset has no sets
		case !errors.Is(err, nl.IPSetError(nl.IPSET_ERR_BUSY)) || try == 100:
			return fmt.Errorf("removing the set %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// hasNFTables reports whether a kube-proxy in nftables mode has its table here.
func hasNFTables() bool {
	rules, hooks, err := xtables.NFTRules(unix.AF_UNSPEC)
	if err != nil {
		return false
	}
	for _, r := range rules {
		if r.Table == "kube-proxy" {
			return true
		}
	}
	for _, h := range hooks {
		if h.Table == "kube-proxy" {
			return true
		}
	}
	return false
}

// elsewhere names who else seems to handle Services here, empty if nobody does.
func elsewhere() string {
	var who []string
	for _, s := range dataplane.Look() {
		who = append(who, s.String())
	}
	if len(who) == 0 && strings.Count(readFile("/proc/thread-self/net/ip_vs"), "\n") > 3 {
		who = append(who, "IPVS without a kube-proxy's rules (kube-router?)")
	}
	return strings.Join(who, ", ")
}

func readFile(path string) string {
	b, err := os.ReadFile(filepath.Clean(path))
	if err != nil {
		return ""
	}
	return string(b)
}

package iptables

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Dual is the iptables mode of both address families, IPv4 by iptables and IPv6
// by ip6tables. Where the node has no IPv6 it is the mode of IPv4 alone. It
// implements proxy.Backend.
type Dual struct {
	v4, v6 *Backend
	// off is set where the node has no IPv6.
	off atomic.Bool
}

var (
	_ proxy.Backend   = (*Dual)(nil)
	_ proxy.Forgetter = (*Dual)(nil)
	_ proxy.Watcher   = (*Dual)(nil)
)

// NewDual returns a Dual that has not touched the kernel. Each family takes of
// cfg what is of it; cfg.Family does not matter.
func NewDual(cfg Config) *Dual {
	six := cfg
	cfg.Family, six.Family = xtables.IPv4, xtables.IPv6
	return &Dual{v4: New(cfg), v6: New(six)}
}

// Mode returns proxy.IPTables.
func (d *Dual) Mode() proxy.Mode { return proxy.IPTables }

// IPv6 reports whether the node has IPv6, as Preflight found.
func (d *Dual) IPv6() bool { return !d.off.Load() }

// Preflight settles the flavour, which is the same for both families, and
// whether there is IPv6: the program ip6tables, /proc/net/if_inet6, and
// net.ipv6.conf.all.disable_ipv6 that is not 1, as kube-proxy 1.36 asks for.
func (d *Dual) Preflight(ctx context.Context) (flavour, reason string, err error) {
	flavour, reason, err = d.v4.Preflight(ctx)
	if err != nil {
		return "", "", err
	}
	d.v6.cfg.Flavour = flavour
	why := d.v6.noIPv6()
	if why == "" {
		switch _, err := d.v6.cfg.Tools.Version(ctx, d.v4.flavour, xtables.IPv6); {
		case ctx.Err() != nil:
			return "", "", ctx.Err()
		case err != nil:
			why = err.Error()
		}
	}
	if why != "" {
		d.off.Store(true)
		return flavour, reason + "; IPv4 only: " + why, nil
	}
	if _, _, err := d.v6.Preflight(ctx); err != nil {
		return "", "", err
	}
	return flavour, reason, nil
}

// noIPv6 says why this network namespace has no IPv6, "" if it has.
func (b *Backend) noIPv6() string {
	var why string
	err := b.inNetns(func() error {
		if _, err := os.Stat("/proc/thread-self/net/if_inet6"); err != nil {
			why = "the kernel has no IPv6"
			return nil
		}
		off, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6")
		if err == nil && strings.TrimSpace(string(off)) == "1" {
			why = "net.ipv6.conf.all.disable_ipv6 is 1"
		}
		return nil
	})
	if err != nil {
		return err.Error()
	}
	return why
}

// dualProgram is one program for each family.
type dualProgram struct {
	v4, v6 proxy.Program

	indexed sync.Once // guards index
	index   proxy.Index
}

// Render renders both families.
func (d *Dual) Render(s *proxy.Snapshot, o proxy.Overlay) proxy.Program {
	p := &dualProgram{v4: d.v4.Render(s, o)}
	if d.off.Load() {
		return p.v4
	}
	p.v6 = d.v6.Render(s, o)
	return p
}

// Index lists the tagged rules of both families. A tag that both have means the
// same in both.
func (p *dualProgram) Index() proxy.Index {
	p.indexed.Do(func() {
		p.index = maps.Clone(p.v6.Index())
		maps.Copy(p.index, p.v4.Index())
	})
	return p.index
}

// Problems lists what could not be rendered.
func (p *dualProgram) Problems() []proxy.Problem {
	return append(p.v4.Problems()[:len(p.v4.Problems()):len(p.v4.Problems())], p.v6.Problems()...)
}

// Walk asks the packet's family.
func (p *dualProgram) Walk(pkt proxy.Packet) proxy.Outcome {
	if pkt.Dst.Addr().Is6() && !pkt.Dst.Addr().Is4In6() {
		return p.v6.Walk(pkt)
	}
	return p.v4.Walk(pkt)
}

// RuleCounts counts the rules of each table of both families.
func (p *dualProgram) RuleCounts() map[proxy.Table]int {
	n := map[proxy.Table]int{}
	for _, one := range []proxy.Program{p.v4, p.v6} {
		if c, ok := one.(*program); ok {
			maps.Copy(n, c.RuleCounts())
		}
	}
	return n
}

// Text is the text of IPv4, and behind a line that says so that of IPv6 where a
// Service has an address of it.
func (p *dualProgram) Text() string {
	text := p.v4.Text()
	if six, ok := p.v6.(*program); ok && len(six.units) > 0 {
		text += "# ip6tables-restore\n" + six.Text()
	}
	return text
}

// Apply applies both families, one after the other: a fault in one does not
// keep the other from being programmed.
func (d *Dual) Apply(ctx context.Context, prog proxy.Program) (proxy.Report, error) {
	p, ok := prog.(*dualProgram)
	if !ok {
		return d.v4.Apply(ctx, prog)
	}
	var rep, more proxy.Report
	var err, err6 error
	d.v6.aside(func() { rep, err = d.v4.Apply(ctx, p.v4) })
	if d.off.Load() {
		return rep, err
	}
	d.v4.aside(func() { more, err6 = d.v6.Apply(ctx, p.v6) })
	if err6 != nil {
		err6 = fmt.Errorf("IPv6: %w", err6)
	}
	rep.Full = rep.Full || more.Full
	rep.Commits += more.Commits
	rep.Rules += more.Rules
	rep.Bytes += more.Bytes
	rep.Took += more.Took
	rep.Refused += more.Refused
	rep.Partial = rep.Partial && more.Partial
	rep.Refusals = append(rep.Refusals, more.Refusals...)
	if rep.Tables == nil {
		rep.Tables = more.Tables
	} else {
		maps.Copy(rep.Tables, more.Tables)
	}
	return rep, errors.Join(err, err6)
}

// Forget makes the next Apply read the live tables of both families.
func (d *Dual) Forget() {
	d.v4.Forget()
	d.v6.Forget()
}

// Cleanup removes the rules of both families.
func (d *Dual) Cleanup(ctx context.Context) error {
	return errors.Join(d.v4.Cleanup(ctx), d.v6.Cleanup(ctx))
}

// Watch watches both families.
func (d *Dual) Watch(ctx context.Context, changed func(proxy.Drift)) error {
	if d.off.Load() {
		return d.v4.Watch(ctx, changed)
	}
	g, ctx := errgroup.WithContext(ctx)
	seen := make(chan proxy.Drift)
	tell := func(x proxy.Drift) {
		select {
		case seen <- x:
		case <-ctx.Done():
		}
	}
	g.Go(func() error { return d.v4.Watch(ctx, tell) })
	g.Go(func() error { return d.v6.Watch(ctx, tell) })
	g.Go(func() error {
		for {
			select {
			case x := <-seen:
				changed(x)
			case <-ctx.Done():
				return nil
			}
		}
	})
	return g.Wait()
}

// DriftStats adds up both families.
func (d *Dual) DriftStats() proxy.DriftStats {
	a, b := d.v4.DriftStats(), d.v6.DriftStats()
	if b.Last.After(a.Last) {
		a.Last, a.LastWhat = b.Last, b.LastWhat
	}
	a.Certain += b.Certain
	a.Doubts += b.Doubts
	a.Held += b.Held
	return a
}

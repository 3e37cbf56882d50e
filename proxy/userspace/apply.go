package userspace

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Preflight settles the flavour and says which and why, and whether there is
// IPv6. It writes nothing. Apply calls it if nobody did.
func (b *Backend) Preflight(ctx context.Context) (flavour, reason string, err error) {
	b.apply.Lock()
	defer b.apply.Unlock()
	return b.preflight(ctx)
}

func (b *Backend) preflight(ctx context.Context) (flavour, reason string, err error) {
	fl, reason := xtables.NFT, "as configured"
	if b.cfg.Flavour == "auto" {
		fl, reason, err = b.cfg.Tools.Detect(ctx)
	} else if fl, err = xtables.ParseFlavour(b.cfg.Flavour); err == nil {
		_, err = b.cfg.Tools.Version(ctx, fl, xtables.IPv4)
	}
	if err != nil {
		return "", "", fmt.Errorf("proxy/userspace: choosing a flavour: %w", err)
	}
	b.flavour = fl
	b.kernel = map[xtables.Family]*kernel{xtables.IPv4: b.newKernel(xtables.IPv4)}
	why := b.whyNoIPv6(ctx)
	b.noIPv6.Store(why != "")
	if why != "" {
		return fl.String(), reason + "; IPv4 only: " + why, nil
	}
	b.kernel[xtables.IPv6] = b.newKernel(xtables.IPv6)
	return fl.String(), reason, nil
}

// whyNoIPv6 says why this network namespace has no IPv6, "" if it has.
func (b *Backend) whyNoIPv6(ctx context.Context) (why string) {
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
	if err == nil && why == "" {
		_, err = b.cfg.Tools.Version(ctx, b.flavour, xtables.IPv6)
	}
	if err != nil {
		return err.Error()
	}
	return why
}

// Forget makes the next Apply read the live tables.
func (b *Backend) Forget() {
	b.apply.Lock()
	defer b.apply.Unlock()
	for _, k := range b.kernel {
		k.known = false
	}
}

// Apply brings listeners and rules to p: ports are opened before rules lead to
// them, and closed when none does any more. A Service that cannot be served is
// left out and named.
func (b *Backend) Apply(ctx context.Context, prog proxy.Program) (rep proxy.Report, err error) {
	start := time.Now()
	defer func() { rep.Took = time.Since(start) }()
	p, ok := prog.(*program)
	if !ok {
		return rep, fmt.Errorf("proxy/userspace: applying: %T is a program of another mode", prog)
	}
	b.apply.Lock()
	defer b.apply.Unlock()
	if b.closed {
		return rep, errors.New("proxy/userspace: applying: the proxy has ended")
	}
	if b.kernel == nil {
		if _, _, err := b.preflight(ctx); err != nil {
			return rep, err
		}
	}
	rep, closed, err := b.applyOnce(ctx, p)
	if errors.Is(err, errPortsFull) && closed {
		// There is room now: a port is kept until no rule leads to it.
		first := rep
		rep, _, err = b.applyOnce(ctx, p)
		rep.Commits, rep.Rules, rep.Bytes = rep.Commits+first.Commits, rep.Rules+first.Rules, rep.Bytes+first.Bytes
		rep.Full = rep.Full || first.Full
	}
	return rep, err
}

// applyOnce also reports whether ports were closed.
func (b *Backend) applyOnce(ctx context.Context, p *program) (rep proxy.Report, closed bool, err error) {
	errs := b.open(p)
	listened := len(errs)
	for f, k := range b.kernel {
		failed, err := k.apply(ctx, p, b.wanted(p, f), &rep)
		if err != nil {
			errs = append(errs, fmt.Errorf("proxy/userspace: applying: %w", err))
		}
		errs = append(errs, failed...)
		rep.Refused += len(failed)
		if err != nil {
			listened = -1
		}
	}
	rep.Refused += max(listened, 0)
	rep.Partial = listened >= 0 && 2*rep.Refused <= len(p.units)
	if listened >= 0 {
		closed = b.closeUnused(p)
	}
	return rep, closed, errors.Join(errs...)
}

// open opens ports that are missing and tells all what they serve.
func (b *Backend) open(p *program) (errs []error) {
	for _, u := range p.units {
		t := &target{p, u}
		if l := b.listeners[u.key()]; l != nil {
			l.set(t)
			continue
		}
		if !u.served {
			continue
		}
		l, err := b.listen(t)
		if err != nil {
			errs = append(errs, fmt.Errorf("proxy/userspace: Service %s is not served: opening a port: %w", u.svc.Name, err))
			continue
		}
		b.listenersMu.Lock()
		b.listeners[u.key()] = l
		b.listenersMu.Unlock()
	}
	return errs
}

// closeUnused closes the ports of Services that are gone, and reports whether
// there were any.
func (b *Backend) closeUnused(p *program) (closed bool) {
	keep := make(map[key]bool, len(p.units))
	for _, u := range p.units {
		keep[u.key()] = true
	}
	b.listenersMu.Lock()
	defer b.listenersMu.Unlock()
	for k, l := range b.listeners {
		if !keep[k] {
			l.close(proxy.EndedShutdown)
			delete(b.listeners, k)
			closed = true
		}
	}
	return closed
}

// wanted lists the rules of each Service of a family.
func (b *Backend) wanted(p *program, f xtables.Family) map[key][]placed {
	out := make(map[key][]placed)
	for _, u := range p.units {
		if u.family != f {
			continue
		}
		l := b.listeners[u.key()]
		var rules []placed
		for i := range u.rules {
			r := &u.rules[i]
			switch {
			case !r.port:
				rules = append(rules, placed{r.chainKey, r.text})
			case l != nil:
				rules = append(rules, placed{r.chainKey, r.line(l.port)})
			}
		}
		out[u.key()] = rules
	}
	return out
}

// UDPFrontends are the UDP addresses of the Snapshot's Services and the ports of
// this process that serve each: entries of connection tracking that lead to
// other ports are of a process that is gone.
func (b *Backend) UDPFrontends(s *proxy.Snapshot) conntrack.Frontends {
	addrs := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	_ = b.inNetns(func() error {
		addrs = append(addrs, proxy.InterfaceAddrs()...)
		return nil
	})
	ports := make(map[proxy.PortName]conntrack.Backends)
	b.eachListener(func(l *listener) {
		if l.key.name.Proto != conntrack.UDP {
			return
		}
		all := ports[l.key.name]
		if all == nil {
			all = make(conntrack.Backends)
			ports[l.key.name] = all
		}
		for _, a := range addrs {
			if a.Is6() == l.key.six {
				all[netip.AddrPortFrom(a, l.port)] = struct{}{}
			}
		}
	})
	only := proxy.Snapshot{Node: s.Node}
	out := make(conntrack.Frontends)
	for i := range s.Services {
		if s.Services[i].Name.Proto != conntrack.UDP {
			continue
		}
		only.Services = s.Services[i : i+1]
		backends := ports[s.Services[i].Name]
		if backends == nil {
			backends = make(conntrack.Backends)
		}
		for addr := range only.UDPFrontends() {
			if _, taken := out[addr]; !taken {
				out[addr] = backends
			}
		}
	}
	return out
}

// Cleanup removes everything the mode ever writes, in both flavours and
// families, and nothing else. It may be called again and again.
func (b *Backend) Cleanup(ctx context.Context) error {
	b.apply.Lock()
	defer b.apply.Unlock()
	var errs, unread []error
	read := false
	for _, f := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
			have, err := b.ruleset(ctx, fl, f)
			switch {
			case errors.Is(err, fs.ErrNotExist): // not installed, so never written
				continue
			case err != nil && b.kernel[f] != nil && b.flavour == fl:
				errs = append(errs, err)
				continue
			case err != nil: // kept from us, so never written
				unread = append(unread, err)
				continue
			}
			read = true
			runner := xtables.NewRunner(xtables.RunnerConfig{Tools: b.cfg.Tools, Flavour: fl, Family: f})
			rep, err := runner.Apply(ctx, cleanupPlan(have))
			if err != nil {
				errs = append(errs, err)
			}
			for i := range rep.Failed {
				errs = append(errs, &rep.Failed[i])
			}
		}
		if k := b.kernel[f]; k != nil {
			k.known = false
		}
	}
	if !read {
		errs = append(errs, unread...)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("proxy/userspace: cleaning up: %w", err)
	}
	return nil
}

// ruleset reads all rules of a kind, if a chain of ours is named among them. Those
// of another mode may be many.
func (b *Backend) ruleset(ctx context.Context, fl xtables.Flavour, f xtables.Family) (*xtables.Ruleset, error) {
	if ours, err := b.cfg.Tools.Mentions(ctx, fl, f, chainPrefixes()...); err != nil || !ours {
		return &xtables.Ruleset{Family: f}, err
	}
	return b.cfg.Tools.Save(ctx, fl, f, "", false)
}

// cleanupPlan removes our jumps and then our chains.
func cleanupPlan(have *xtables.Ruleset) xtables.Plan {
	jumps, gone := xtables.Phase{Name: "jumps"}, xtables.Phase{Name: "chains"}
	for _, t := range have.Tables {
		var lines []string
		for _, c := range t.Chains {
			for _, r := range c.Rules {
				if ourJump(t.Name, r) && !owned(t.Name, c.Name) {
					lines = append(lines, "-D "+c.Name+" "+r.String())
				}
			}
			if owned(t.Name, c.Name) {
				gone.Units = append(gone.Units, xtables.Unit{
					Table: t.Name, Owner: "chain " + c.Name,
					Lines: []string{":" + c.Name + " - [0:0]", "-X " + c.Name},
				})
			}
		}
		if len(lines) > 0 {
			jumps.Units = append(jumps.Units, xtables.Unit{Table: t.Name, Owner: "jumps", Lines: lines})
		}
	}
	return xtables.Plan{jumps, gone}
}

func sortedKeys[V any](m map[key]V) []key {
	return slices.SortedFunc(maps.Keys(m), func(a, b key) int {
		if c := a.name.Compare(b.name); c != 0 || a.six == b.six {
			return c
		}
		if a.six {
			return 1
		}
		return -1
	})
}

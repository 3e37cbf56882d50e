package ipvs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
)

// Cleanup removes everything the mode ever writes, and nothing else: chains of
// both iptables flavours, our virtual servers, the device kube-ipvs0, our sets.
// Virtual servers of others stay, whatever Config.TakeOver says. A kernel without
// ip_vs, dummy or ipset has none of ours.
func (b *Backend) Cleanup(ctx context.Context) error {
	b.apply.Lock()
	defer b.apply.Unlock()
	b.applied, b.last = nil, nil
	errs := []error{b.cleanRules(ctx)}
	errs = append(errs, b.inNetns(b.cleanKernel))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("proxy/ipvs: cleaning up: %w", err)
	}
	return nil
}

// ours reports whether a chain is one that this mode writes, or the iptables mode:
// they share names and lead to each other.
func ours(table, chain string) bool { return isOurs(table, chain) || xtables.IsKubeProxy(chain) }

// Leftovers removes what this mode left when another mode runs by now, whose
// chains have in part the same names: those stay.
type Leftovers struct{ b *Backend }

// NewLeftovers returns the Leftovers of a node; of cfg the Tools matter.
func NewLeftovers(cfg Config) *Leftovers { return &Leftovers{&Backend{cfg: cfg.withDefaults()}} }

// Cleanup does nothing on a node without the device kube-ipvs0 and the sets.
func (l *Leftovers) Cleanup(ctx context.Context) error {
	there := false
	if err := l.b.inNetns(func() error { there = Present(); return nil }); err != nil || !there {
		return err
	}
	err := l.b.eachRuleset(ctx, func(have *xtables.Ruleset) (xtables.Plan, []error) {
		return l.jumps(have), nil
	})
	if err == nil {
		err = l.b.eachRuleset(ctx, func(have *xtables.Ruleset) (xtables.Plan, []error) {
			return xtables.Removal(have, alone)
		})
	}
	if err := errors.Join(err, l.b.inNetns(l.b.cleanKernel)); err != nil {
		return fmt.Errorf("proxy/ipvs: removing what the IPVS mode left: %w", err)
	}
	return nil
}

// alone reports whether a chain is this mode's and no other's.
func alone(table, chain string) bool {
	switch chain {
	case chainNodePort, chainLoadBalancer, chainSourceRanges, chainFilter, chainOutFilter, proxy.ChainLife, proxy.ChainPick:
		return isOurs(table, chain)
	}
	return false
}

// jumps lists the jumps to chains of both modes that only this one writes.
func (l *Leftovers) jumps(have *xtables.Ruleset) xtables.Plan {
	r := &renderer{cfg: &Config{Trace: true, NFLogGroup: 1, MasqueradeMark: 1}, ip6: have.Family == xtables.IPv6}
	layout, _ := r.rules()
	var ph xtables.Phase
	for _, t := range have.Tables {
		var lines []string
		for i := range layout.Jumps {
			j := &layout.Jumps[i]
			rule, err := xtables.ParseRule(have.Family, j.Rule)
			c := t.Chain(j.Chain)
			if err != nil || j.Table != t.Name || c == nil || alone(t.Name, rule.Target) || shared(j.Rule) {
				continue
			}
			for _, r := range c.Rules {
				if r.String() == rule.String() {
					lines = append(lines, "-D "+j.Chain+" "+r.String())
				}
			}
		}
		if len(lines) > 0 {
			ph.Units = append(ph.Units, xtables.Unit{Table: t.Name, Owner: "jumps", Lines: lines})
		}
	}
	return xtables.Plan{ph}
}

// shared reports whether a jump is the same in the iptables mode.
func shared(rule string) bool {
	for _, part := range []string{"kubernetes service portals", "kubernetes postrouting rules", "kubernetes forwarding rules", "--tcp-flags", "--ctstate RELATED"} {
		if strings.Contains(rule, part) {
			return true
		}
	}
	return false
}

// chainLocalnet is where the iptables mode guards 127.0.0.0/8, and so does the
// kubelet.
const chainLocalnet = "KUBE-FIREWALL"

// unguarded reports whether the guard of 127.0.0.0/8 is the iptables mode's alone.
// It goes with everything else; until then it stays, as the setting does that
// makes it necessary.
func unguarded(have *xtables.Ruleset) bool {
	c := have.Chain("filter", chainLocalnet)
	if c == nil || have.Chain("mangle", "KUBE-KUBELET-CANARY") != nil || have.Chain("mangle", "KUBE-IPTABLES-HINT") != nil {
		return false
	}
	return len(c.Rules) == 0 || len(c.Rules) == 1 && c.Rules[0].Target == "DROP" && strings.Contains(c.Rules[0].String(), "block incoming localnet connections")
}

func (b *Backend) cleanRules(ctx context.Context) error {
	return b.eachRuleset(ctx, func(have *xtables.Ruleset) (xtables.Plan, []error) {
		firewall := unguarded(have)
		return xtables.Removal(have, func(table, chain string) bool {
			return ours(table, chain) || firewall && table == "filter" && chain == chainLocalnet
		})
	})
}

// eachRuleset applies what plan makes of the rules of each family and flavour.
func (b *Backend) eachRuleset(ctx context.Context, plan func(*xtables.Ruleset) (xtables.Plan, []error)) error {
	var errs []error
	for _, family := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
			have, err := b.cfg.Tools.Save(ctx, fl, family, "", false)
			if err != nil {
				continue // not installed or not in this kernel: see proxy/iptables
			}
			todo, stay := plan(have)
			errs = append(errs, stay...)
			if len(todo) == 0 || len(todo[0].Units) == 0 {
				continue
			}
			rep, err := xtables.NewRunner(xtables.RunnerConfig{Tools: b.cfg.Tools, Flavour: fl, Family: family}).Apply(ctx, todo)
			errs = append(errs, err)
			for i := range rep.Failed {
				errs = append(errs, &rep.Failed[i])
			}
		}
	}
	return errors.Join(errs...)
}

// cleanKernel removes what is not rules, in the namespace.
func (b *Backend) cleanKernel() error {
	h := newHeld()
	k := &kernel{}
	names, err := k.readSets(h)
	if err != nil && !absent(err) {
		return err
	}
	if err := k.readAddrs(h); err != nil {
		return err
	}
	if len(names) == 0 && len(h.bound) == 0 && !hasDevice() {
		return nil
	}
	var errs []error
	if hasIPVS() {
		errs = append(errs, b.cleanServers(h))
	}
	if link, err := netlink.LinkByName(Device); err == nil && link.Type() == "dummy" {
		errs = append(errs, netlink.LinkDel(link))
	}
	for name := range names {
		if _, _, ours := setNamed(name); ours {
			if err := netlink.IpsetDestroy(name); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("destroying the set %s: %w", name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// cleanServers removes our virtual servers.
func (b *Backend) cleanServers(h *held) error {
	k := &kernel{}
	defer k.close()
	if err := k.open(); err != nil {
		return err
	}
	if err := b.readServers(k, h, false); err != nil {
		return err
	}
	var ops []op
	for at, v := range h.virtuals {
		if !v.foreign && !v.spared {
			ops = append(ops, op{kind: delVirtual, key: at})
		}
	}
	a := &applying{b: b, k: k, failed: map[*unit]error{}}
	return errors.Join(a.do(h, ops), errors.Join(a.others...))
}

// absent reports whether an error says that the kernel lacks a subsystem.
func absent(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) ||
		errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, fs.ErrNotExist)
}

func hasDevice() bool {
	_, err := netlink.LinkByName(Device)
	return err == nil
}

// hasIPVS reports whether the kernel has ip_vs, without loading it.
func hasIPVS() bool {
	_, err := netlink.GenlFamilyGet("IPVS")
	return err == nil
}

// Present reports whether the calling thread's network namespace holds anything
// that a proxy in this mode left there: the device or one of the sets. It changes
// nothing and loads no module.
func Present() bool {
	if hasDevice() {
		return true
	}
	list, err := netlink.IpsetListAll()
	if err != nil {
		return false
	}
	for i := range list {
		if _, _, ours := setNamed(list[i].SetName); ours && strings.HasPrefix(list[i].SetName, "KUBE-") {
			return true
		}
	}
	return false
}

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

func (b *Backend) cleanRules(ctx context.Context) error {
	var errs []error
	for _, family := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
			have, err := b.cfg.Tools.Save(ctx, fl, family, "", false)
			if err != nil {
				continue // not installed or not in this kernel: see proxy/iptables
			}
			plan, stay := xtables.Removal(have, isOurs)
			errs = append(errs, stay...)
			if len(plan) == 0 {
				continue
			}
			rep, err := xtables.NewRunner(xtables.RunnerConfig{Tools: b.cfg.Tools, Flavour: fl, Family: family}).Apply(ctx, plan)
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

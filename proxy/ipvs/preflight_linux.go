package ipvs

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	mobyipvs "github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/xtables"
)

// probeAddr is where Preflight tries whether a virtual server can be made: an
// address for documentation (RFC 5737), as kube-proxy uses it.
var probeAddr = netip.MustParseAddrPort("198.51.100.0:20000")

// probeSet is a set that Preflight makes and destroys.
const probeSet = "KPTRACE-PROBE"

// Preflight finds out whether this mode can run here, by doing what it needs: a
// virtual server with the chosen scheduler is made and removed, and so are a
// dummy device and a set. It then settles the flavour of iptables and whether
// there is IPv6. Modules are loaded on demand. The variant is the scheduler, the
// reason names the flavour.
func (b *Backend) Preflight(ctx context.Context) (variant, reason string, err error) {
	b.apply.Lock()
	defer b.apply.Unlock()
	return b.preflight(ctx)
}

func (b *Backend) preflight(ctx context.Context) (variant, reason string, err error) {
	if err := b.inNetns(b.probe); err != nil {
		return "", "", fmt.Errorf("proxy/ipvs: %w", err)
	}
	fl, why, err := b.choose(ctx)
	if err != nil {
		return "", "", fmt.Errorf("proxy/ipvs: choosing a flavour: %w", err)
	}
	runner := func(f xtables.Family) *xtables.Runner {
		return xtables.NewRunner(xtables.RunnerConfig{Tools: b.cfg.Tools, Flavour: fl, Family: f})
	}
	families := []xtables.Family{xtables.IPv4, xtables.IPv6}
	no := ""
	if !b.cfg.IPv4Only {
		err := b.inNetns(func() error { no = noIPv6(); return nil })
		if err != nil {
			return "", "", err
		}
		if no == "" {
			if _, err := b.cfg.Tools.Version(ctx, fl, xtables.IPv6); err != nil {
				no = err.Error()
			}
		}
	}
	if b.cfg.IPv4Only || no != "" {
		b.render.Lock()
		b.cfg.IPv4Only = true
		b.render.Unlock()
		families = families[:1]
	}
	for _, f := range families {
		other, err := b.cfg.Tools.Survey(ctx, fl.Other(), f)
		if err != nil {
			return "", "", fmt.Errorf("proxy/ipvs: looking at iptables-%s: %w", fl.Other(), err)
		}
		if n := len(other.Live); n > 0 && !b.cfg.TakeOver {
			return "", "", fmt.Errorf("proxy/ipvs: iptables-%s was chosen (%s), but iptables-%s has %d live chains of a kube-proxy, such as %s, "+
				"and a packet would pass both: stop what wrote them and clean up, choose that flavour, or take over", fl, why, fl.Other(), n, other.Live[0])
		}
	}
	b.flavour, b.runners = fl, nil
	for _, f := range families {
		b.runners = append(b.runners, runner(f))
	}
	reason = "iptables-" + fl.String() + ": " + why
	if no != "" {
		reason += "; IPv4 only: " + no
	}
	return b.scheduler.String(), reason, nil
}

func (b *Backend) connect(ctx context.Context) error {
	if b.runners != nil {
		return nil
	}
	_, _, err := b.preflight(ctx)
	return err
}

// choose picks the flavour of iptables.
func (b *Backend) choose(ctx context.Context) (xtables.Flavour, string, error) {
	if b.cfg.Flavour == "auto" {
		return b.cfg.Tools.Detect(ctx)
	}
	fl, err := xtables.ParseFlavour(b.cfg.Flavour)
	if err != nil {
		return 0, "", err
	}
	_, err = b.cfg.Tools.Version(ctx, fl, xtables.IPv4)
	return fl, "as configured", err
}

// probe does once what the mode needs, in the namespace.
func (b *Backend) probe() error {
	k := &kernel{}
	defer k.close()
	if err := k.open(); err != nil {
		return err
	}
	if err := b.probeScheduler(k); err != nil {
		return err
	}
	if hasDevice() {
		if err := k.ensureDevice(); err != nil {
			return err
		}
	} else if err := probeDevice(); err != nil {
		return err
	}
	if err := probeIPSet(); err != nil {
		return fmt.Errorf("the kernel has no ipset of type %s (module ip_set_hash_ipport): %w", typeIPPort, explainSet(err))
	}
	return nil
}

// probeScheduler makes a virtual server with our scheduler, unless there is one,
// and looks for it: libraries report no error where ip_vs is absent.
func (b *Backend) probeScheduler(k *kernel) error {
	services, err := k.virtualServers()
	if err != nil {
		return fmt.Errorf("asking IPVS: %w", permission(err))
	}
	for _, s := range services {
		if s.scheduler == b.scheduler.Name {
			return nil
		}
	}
	probe := &mobyipvs.Service{Address: probeAddr.Addr().AsSlice(), Port: probeAddr.Port(), Protocol: unix.IPPROTO_TCP,
		AddressFamily: unix.AF_INET, SchedName: b.scheduler.Name, Netmask: 1<<32 - 1}
	err = k.ipvs.NewService(probe)
	if errors.Is(err, unix.EEXIST) { // left behind by a probe that was killed
		err = errors.Join(k.ipvs.DelService(probe), k.ipvs.NewService(probe))
	}
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("the kernel has no IPVS scheduler %s: load the module ip_vs_%s, or choose another by --ipvs-scheduler", b.scheduler.Name, b.scheduler.Name)
	}
	if err != nil {
		return fmt.Errorf("making a virtual server to see whether it works: %w", permission(err))
	}
	if err := k.ipvs.DelService(probe); err != nil {
		return fmt.Errorf("removing the virtual server %s that was made to see whether it works: %w", probeAddr, err)
	}
	return nil
}

// permission explains why the kernel would not: IPVS asks for CAP_NET_ADMIN in
// the first user namespace, whatever the network namespace is.
func permission(err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: IPVS takes requests from real root alone, not from a user namespace", err)
	}
	return err
}

func probeDevice() error {
	link := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "kptrace-probe"}}
	err := netlink.LinkAdd(link)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("the kernel makes no dummy device (module dummy): %w", err)
	}
	made, err := netlink.LinkByName(link.Name)
	if err == nil {
		err = netlink.LinkDel(made)
	}
	if err != nil {
		return fmt.Errorf("removing the dummy device that was made to see whether it works: %w", err)
	}
	return nil
}

func probeIPSet() error {
	err := netlink.IpsetCreate(probeSet, typeIPPort, netlink.IpsetCreateOptions{})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return netlink.IpsetDestroy(probeSet)
}

// timeouts sets how long IPVS remembers idle connections, where that is
// configured.
func (b *Backend) timeouts(k *kernel) error {
	c := mobyipvs.Config{TimeoutTCP: b.cfg.TCPTimeout, TimeoutTCPFin: b.cfg.TCPFinTimeout, TimeoutUDP: b.cfg.UDPTimeout}
	if c == (mobyipvs.Config{}) {
		return nil
	}
	have, err := k.ipvs.GetConfig()
	if err != nil {
		return fmt.Errorf("reading IPVS's timeouts: %w", err)
	}
	for _, d := range []struct{ want, have *time.Duration }{
		{&c.TimeoutTCP, &have.TimeoutTCP}, {&c.TimeoutTCPFin, &have.TimeoutTCPFin}, {&c.TimeoutUDP, &have.TimeoutUDP},
	} {
		if *d.want == 0 {
			*d.want = *d.have // some kernels take 0 for what it says
		}
	}
	if c == *have {
		return nil
	}
	if err := k.ipvs.SetConfig(&c); err != nil {
		return fmt.Errorf("setting IPVS's timeouts: %w", err)
	}
	return nil
}

// keepSysctls sets those of IPVS itself again, which go with the module.
func keepSysctls() error {
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return fmt.Errorf("asking for the kernel's release: %w", err)
	}
	for _, s := range Sysctls(false, string(release)) {
		path := "/proc/sys/" + s.Name
		if now, err := os.ReadFile(path); !strings.Contains(s.Name, "/vs/") || err == nil && strings.TrimSpace(string(now)) == s.Value {
			continue
		}
		if err := os.WriteFile(path, []byte(s.Value), 0); err != nil {
			return fmt.Errorf("setting what IPVS needs: %w", err)
		}
	}
	return nil
}

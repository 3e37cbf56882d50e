package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"

	"github.com/kptrace/kptrace/internal/controlplane"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
)

// The two that are held side by side.
const (
	upstream = "upstream"
	kptrace  = "kptrace"
)

// besideResult is one proxy at work. Times are in seconds, as the proxy's own
// metrics give them, memory is in bytes and that of the proxy alone, without
// the programs that it runs.
type besideResult struct {
	cell
	Proxy string
	Full  float64
	// Unfinished says that the first full sync did not end within Full.
	Unfinished            bool
	Endpoint, Add, Remove float64
	Memory                int64
}

// binEnv says where scripts/controlplane.sh has put the programs.
const binEnv = "KPTRACE_CONTROLPLANE"

// beside measures upstream and kptrace in both flavours, one after the other.
func beside(ctx context.Context, c cell, o options) ([]besideResult, error) {
	bin := os.Getenv(binEnv)
	if bin == "" {
		return nil, fmt.Errorf("%s is not set: run this by `make bench-sync`", binEnv)
	}
	dir, err := os.MkdirTemp("", "benchsync")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	plane, err := controlplane.Start(ctx, controlplane.Config{Bin: bin, Dir: dir})
	if err != nil {
		return nil, err
	}
	defer plane.Stop() //nolint:errcheck // it is of no more use
	o.say("the API server is ready")
	objects, err := newObjects(ctx, plane.Kubeconfig(controlplane.Admin), c)
	if err != nil {
		return nil, err
	}
	o.say("%d Services of %d endpoints are written", c.Services, c.Endpoints)
	var all []besideResult
	for _, way := range ways(c.Mode) {
		for _, proxy := range []string{upstream, kptrace} {
			r := besideResult{cell: c, Proxy: proxy}
			r.Mode, r.Flavour = way.mode, way.flavour
			b := &besides{besideResult: &r, plane: plane, objects: objects, o: o, bin: bin, dir: dir}
			if err := b.measure(ctx); err != nil {
				return nil, fmt.Errorf("%s, %s %s: %w", proxy, way.mode, way.flavour, err)
			}
			o.say("%s, mode %s: first full sync %s, one endpoint %s", proxy, cmp.Or(way.mode, "iptables"), show(r.Full), maybe(r.Endpoint))
			all = append(all, r)
		}
	}
	return all, nil
}

// way is a mode and a flavour of iptables.
type way struct{ mode, flavour string }

// ways are what is measured side by side: in the guest, which has no nf_tables,
// both modes, elsewhere both flavours.
func ways(mode string) []way {
	if mode == modeIPVS {
		return []way{{modeIPVS, "legacy"}, {"", "legacy"}}
	}
	return []way{{"", "nft"}, {"", "legacy"}}
}

// besides is one proxy in a network namespace of its own.
type besides struct {
	*besideResult
	plane    *controlplane.Cluster
	objects  *objects
	o        options
	bin, dir string

	ns   *netns.NS
	proc *exec.Process
	said bytes.Buffer
}

func (b *besides) measure(ctx context.Context) error {
	var err error
	if b.ns, err = netns.New(); err != nil {
		return err
	}
	defer b.ns.Close()
	if err := addAddress(b.ns, nodeAddr); err != nil {
		return err
	}
	stop, err := b.plane.Forward(b.ns)
	if err != nil {
		return err
	}
	defer stop()
	if err := b.start(); err != nil {
		return err
	}
	defer b.end()
	if err := b.first(ctx); err != nil || b.Unfinished {
		b.Memory = errless(peakOf(b.proc.PID()))
		return err
	}
	if err := b.small(ctx); err != nil {
		return err
	}
	b.Memory, err = peakOf(b.proc.PID())
	return err
}

func (b *besides) start() error {
	args := []string{
		"--kubeconfig=" + b.plane.Kubeconfig(controlplane.KubeProxy), "--hostname-override=" + nodeName,
		"--proxy-mode=iptables", "--iptables-min-sync-period=100ms", "--cluster-cidr=" + podRange,
		"--metrics-bind-address=" + metricsAddr, "--healthz-bind-address=127.0.0.1:10256",
		"--conntrack-max-per-core=0", "--conntrack-min=0",
		"--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s",
	}
	if b.Mode == modeIPVS {
		args[2], args[3] = "--proxy-mode=ipvs", "--ipvs-scheduler=rr"
	}
	spec := exec.Spec{Path: filepath.Join(b.bin, "kube-proxy"), Args: args}
	if b.Proxy == kptrace {
		spec.Path = b.o.binary
		spec.Args = append([]string{"proxy"}, append(args, "--trace=false", "--iptables-flavour="+b.Flavour,
			"--socket="+filepath.Join(b.dir, b.Flavour+".sock"))...)
	} else {
		// It runs iptables and its kin without more to their names.
		programs := filepath.Join(b.dir, "bin-"+b.Flavour)
		if err := flavoured(programs, b.Flavour); err != nil {
			return err
		}
		spec.Env = []string{"PATH=" + programs + ":" + os.Getenv("PATH")}
	}
	spec.Netns, spec.OwnGroup, spec.Stdout, spec.Stderr = b.ns.Fd(), true, &b.said, &b.said
	var err error
	b.proc, err = exec.Start(spec)
	return err
}

// end ends the proxy. One that is in the midst of a restore is not waited for.
func (b *besides) end() {
	_ = b.proc.Signal(syscall.SIGTERM)
	select {
	case <-b.proc.Done():
	case <-time.After(5 * time.Second):
		_ = b.proc.Kill()
		<-b.proc.Done()
	}
}

// first waits for the first full sync.
func (b *besides) first(ctx context.Context) error {
	for end := time.Now().Add(b.o.limit); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		select {
		case <-b.proc.Done():
			return fmt.Errorf("it ended: %w\n%s", b.proc.Wait(), b.said.String())
		default:
		}
		m, err := scrape(ctx, b.ns, b.Mode)
		if err != nil {
			continue // not yet listening
		}
		if m.fulls > 0 {
			b.Full = m.full / m.fulls
			return b.complete(m)
		}
	}
	b.Full, b.Unfinished = b.o.limit.Seconds(), true
	return nil
}

// complete refuses to measure a sync that was none.
func (b *besides) complete(m metrics) error {
	if b.Mode == modeIPVS {
		return b.balanced()
	}
	if least := float64(b.Services * (2 + 3*b.Endpoints)); m.rules < least {
		return fmt.Errorf("after the first full sync there are %.0f rules in nat, want %.0f at least", m.rules, least)
	}
	return nil
}

// small makes small changes by the API server, and says how long each took the
// proxy.
func (b *besides) small(ctx context.Context) error {
	var all [3][]float64
	for n := range b.rounds() {
		if err := b.objects.spareEndpoints(ctx, true); err != nil {
			return err
		}
		if err := b.settle(ctx); err != nil {
			return err
		}
		for i, do := range []func() error{
			func() error { return b.objects.moveEndpoint(ctx, n) },
			func() error { return b.objects.spareService(ctx, true) },
			func() error { return b.objects.spareService(ctx, false) },
		} {
			took, err := b.syncs(ctx, do)
			if err != nil {
				return err
			}
			all[i] = append(all[i], took)
		}
		if err := b.objects.spareEndpoints(ctx, false); err != nil {
			return err
		}
	}
	b.Endpoint, b.Add, b.Remove = median(all[0]), median(all[1]), median(all[2])
	return nil
}

// syncs makes a change and returns how long the proxy took for it.
func (b *besides) syncs(ctx context.Context, do func() error) (float64, error) {
	before, err := scrape(ctx, b.ns, b.Mode)
	if err != nil {
		return 0, err
	}
	if err := do(); err != nil {
		return 0, err
	}
	for end := time.Now().Add(max(time.Minute, b.o.limit)); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		now, err := scrape(ctx, b.ns, b.Mode)
		if err != nil {
			return 0, err
		}
		if now.syncs() > before.syncs() {
			if err := b.settle(ctx); err != nil {
				return 0, err
			}
			if now, err = scrape(ctx, b.ns, b.Mode); err != nil {
				return 0, err
			}
			return now.took() - before.took(), nil
		}
	}
	return 0, errors.New("a change was not programmed in time")
}

// settle waits until the proxy has had nothing to do for a moment.
func (b *besides) settle(ctx context.Context) error {
	last, since := -1.0, time.Now()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		m, err := scrape(ctx, b.ns, b.Mode)
		if err != nil {
			return err
		}
		if n := m.syncs(); n != last {
			last, since = n, time.Now()
		} else if time.Since(since) > 400*time.Millisecond {
			return nil
		}
	}
	return errors.New("it does not come to rest")
}

// addAddress gives a namespace an address, on lo.
func addAddress(ns *netns.NS, ip netip.Addr) error {
	nl, err := netlink.NewHandleAt(vnetns.NsHandle(ns.Fd()))
	if err != nil {
		return err
	}
	defer nl.Close()
	lo, err := nl.LinkByName("lo")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(netip.PrefixFrom(ip, ip.BitLen()).String())
	if err != nil {
		return err
	}
	return nl.AddrAdd(lo, addr)
}

// flavoured fills a folder with iptables and its kin, all of one flavour.
func flavoured(dir, flavour string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, name := range []string{"iptables", "ip6tables"} {
		for _, verb := range []string{"", "-save", "-restore"} {
			program, err := exec.LookPath(name + "-" + flavour + verb)
			if err != nil {
				return err
			}
			// A link would do if the program did not look at its own name.
			if err := os.WriteFile(filepath.Join(dir, name+verb), []byte("#!/bin/sh\nexec "+program+" \"$@\"\n"), 0o700); err != nil {
				return err
			}
		}
	}
	return nil
}

// peakOf is the most memory in bytes that a process had resident.
func peakOf(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("process %d says nothing of its memory", pid)
}

func errless(n int64, _ error) int64 { return n }

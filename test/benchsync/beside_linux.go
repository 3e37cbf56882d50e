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
	Full  span
	// The small changes: one endpoint moved, a Service added and removed.
	Endpoint, Add, Remove span
	Memory                int64
}

// span is a time that was measured, none for zero.
type span struct {
	Seconds float64
	// More says that it was not over then.
	More bool `json:",omitempty"`
}

func (s span) String() string {
	switch {
	case s.Seconds == 0:
		return "-"
	case s.More:
		return fmt.Sprintf("> %.0f s", s.Seconds)
	}
	return show(s.Seconds)
}

// less reports whether it is known to be less than o.
func (s span) less(o span) bool { return s.Seconds > 0 && !s.More && s.Seconds < o.Seconds }

// by says what part of o it is. Of something that was not over it is at most that.
func (s span) by(o span) string {
	switch {
	case s.Seconds == 0 || o.Seconds == 0 || s.More:
		return "-"
	case o.More:
		return fmt.Sprintf("< %.3g", s.Seconds/o.Seconds)
	}
	return fmt.Sprintf("%.2g", s.Seconds/o.Seconds)
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
			o.say("%s, mode %s: one endpoint %s, Service added %s, removed %s", proxy, cmp.Or(way.mode, "iptables"), r.Endpoint, r.Add, r.Remove)
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
	at   metrics // when it came to rest last
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
	if err := b.first(ctx); err != nil {
		return err
	}
	b.o.say("%s, mode %s: first full sync %s", b.Proxy, cmp.Or(b.Mode, "iptables"), b.Full)
	if !b.Full.More {
		if err := b.small(ctx); err != nil {
			return err
		}
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
		// Every 30 s, upstream's default, it would do nothing else.
		args = append(args, "--ipvs-sync-period=24h")
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
	for end := time.Now().Add(b.o.limit); time.Now().Before(end); time.Sleep(b.o.poll()) {
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
			b.Full = span{Seconds: m.full / m.fulls}
			return b.complete(m)
		}
	}
	b.Full = span{b.o.limit.Seconds(), true}
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
// proxy. After one that was not over in time there are no more.
func (b *besides) small(ctx context.Context) error {
	if err := b.settle(ctx); err != nil {
		return err
	}
	var all [3][]float64
	into := [3]*span{&b.Endpoint, &b.Add, &b.Remove}
	rounds, changes := b.extent()
	for round := range rounds {
		if changes > 1 {
			if err := b.spareEndpoints(ctx, true); err != nil {
				return err
			}
		}
		for i, do := range []func() error{
			func() error { return b.objects.moveEndpoint(ctx) },
			func() error { return b.objects.spareService(ctx, true) },
			func() error { return b.objects.spareService(ctx, false) },
		}[:changes] {
			took, err := b.syncs(ctx, do)
			if err != nil {
				return err
			}
			b.o.say("change %d of round %d: %s", i, round, took)
			if took.More {
				*into[i] = took
				return nil
			}
			all[i] = append(all[i], took.Seconds)
			*into[i] = span{Seconds: median(all[i])}
		}
		if changes > 1 {
			if err := b.spareEndpoints(ctx, false); err != nil {
				return err
			}
		}
	}
	return nil
}

// spareEndpoints has the proxy learn of endpoints that no Service has yet, or
// forget them, and waits until it has.
func (b *besides) spareEndpoints(ctx context.Context, there bool) error {
	if err := b.objects.spareEndpoints(ctx, there); err != nil {
		return err
	}
	return b.settle(ctx)
}

// syncs makes a change and returns how long the proxy took for it.
func (b *besides) syncs(ctx context.Context, do func() error) (span, error) {
	before := b.at
	if err := do(); err != nil {
		return span{}, err
	}
	for end := time.Now().Add(b.o.limit); time.Now().Before(end); time.Sleep(b.o.poll()) {
		now, err := scrape(ctx, b.ns, b.Mode)
		if err != nil {
			return span{}, err
		}
		if now.syncs() > before.syncs() {
			if err := b.settle(ctx); err != nil {
				return span{}, err
			}
			took := b.at.took() - before.took()
			if b.o.guest {
				// A second sync may be under way, and end in the next change's
				// time: what counts is how long one takes.
				took /= b.at.syncs() - before.syncs()
			}
			return span{Seconds: took}, nil
		}
	}
	return span{b.o.limit.Seconds(), true}, nil
}

// settle waits until the proxy has ended no sync for a moment.
func (b *besides) settle(ctx context.Context) error {
	rest := b.o.rest()
	last, since := -1.0, time.Now()
	for end := time.Now().Add(max(time.Minute, b.o.limit)); time.Now().Before(end); time.Sleep(b.o.poll()) {
		m, err := scrape(ctx, b.ns, b.Mode)
		if err != nil {
			return err
		}
		b.at = m
		if n := m.syncs(); n != last {
			last, since = n, time.Now()
		} else if time.Since(since) > rest {
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

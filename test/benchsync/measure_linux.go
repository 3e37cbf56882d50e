package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
)

// rounds is how often small changes are made; the median counts.
const rounds = 5

// services makes a Snapshot.
func (c cell) services() *proxy.Snapshot {
	s := &proxy.Snapshot{Node: proxy.Node{Name: "node1", Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}}
	for i := range c.Services {
		s.Services = append(s.Services, c.service(i))
	}
	return s
}

func (c cell) service(i int) proxy.Service {
	svc := proxy.Service{
		Name: proxy.PortName{Namespace: fmt.Sprintf("ns%d", i%100), Name: fmt.Sprintf("svc%06d", i), Port: "http", Proto: conntrack.TCP},
		Type: "ClusterIP", ClusterIP: netip.AddrFrom4([4]byte{172, 30, byte(i >> 8), byte(i)}), Port: 80,
	}
	if c.NodePorts {
		svc.Type, svc.NodePort = "NodePort", uint16(30000+i)
	}
	for e := range c.Endpoints {
		svc.Endpoints = append(svc.Endpoints, c.endpoint(i, e))
	}
	return svc
}

func (c cell) endpoint(i, e int) proxy.Endpoint {
	ip := netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), byte(e + 1)})
	return proxy.Endpoint{Addr: netip.AddrPortFrom(ip, 8080), Ready: true, Serving: true}
}

// world is a backend in a network namespace of its own.
type world struct {
	cell
	ns      *netns.NS
	backend *iptables.Backend
	state   *proxy.Snapshot
	report  proxy.Report
}

func (c cell) world(dir string) (*world, error) {
	ns, err := netns.New()
	if err != nil {
		return nil, err
	}
	w := &world{cell: c, ns: ns, state: c.services()}
	w.backend = w.newBackend(dir)
	return w, w.ready()
}

// ready settles the flavour, which a proxy does once, before its first sync.
func (w *world) ready() error {
	_, _, err := w.backend.Preflight(context.Background())
	return err
}

func (w *world) newBackend(dir string) *iptables.Backend {
	return iptables.New(iptables.Config{Flavour: w.Flavour, Tools: xtables.Tools{Netns: w.ns.Fd(), Dir: dir}, Trace: w.Trace,
		LocalhostNodePorts: true, ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}})
}

// sync programs the state and says how long that took.
func (w *world) sync(ctx context.Context) (float64, error) {
	start := time.Now()
	rep, err := w.backend.Apply(ctx, w.backend.Render(w.state, proxy.Overlay{}))
	w.report = rep
	return time.Since(start).Seconds(), err
}

// change makes the n-th small change and programs it.
func (w *world) change(ctx context.Context, n int) (float64, error) {
	next := *w.state
	next.Services = slices.Clone(w.state.Services)
	svc := &next.Services[len(next.Services)/2]
	svc.Endpoints = slices.Clone(svc.Endpoints)
	svc.Endpoints[3] = w.endpoint(len(next.Services)/2, 200+n)
	w.state = &next
	return w.sync(ctx)
}

// extra adds a Service, or takes it away.
func (w *world) extra(ctx context.Context, add bool) (float64, error) {
	next := *w.state
	next.Services = slices.Clone(w.state.Services[:w.Services])
	if add {
		next.Services = append(next.Services, w.service(w.Services))
	}
	w.state = &next
	return w.sync(ctx)
}

// measure measures one line: memory, drift and restart first, while this process
// has done nothing else, and keeps what is written; then times, of ours in turn
// with those of the floor.
func measure(ctx context.Context, c cell) (*result, error) {
	r := &result{cell: c}
	dir, err := os.MkdirTemp("", "benchsync")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := wrap(dir, r.Flavour); err != nil {
		return nil, err
	}
	w, err := c.world(dir)
	if err != nil {
		return nil, err
	}
	full, small, err := r.capture(ctx, w, dir)
	if err != nil {
		return nil, err
	}
	if err := w.drift(ctx, r); err != nil {
		return nil, err
	}
	w.backend = w.newBackend("")
	if r.Restart, err = w.sync(ctx); err != nil {
		return nil, err
	}
	if w.report.Commits != 0 {
		return nil, fmt.Errorf("a restart wrote %d commits", w.report.Commits)
	}
	w.ns.Close()
	return r, r.race(ctx, full, small)
}

// steps are the n-th small change of each kind.
func (w *world) steps(n int) []func(context.Context) (float64, error) {
	return []func(context.Context) (float64, error){
		func(ctx context.Context) (float64, error) { return w.change(ctx, n) },
		func(ctx context.Context) (float64, error) { return w.extra(ctx, true) },
		func(ctx context.Context) (float64, error) { return w.extra(ctx, false) },
	}
}

// drift watches for a while, then changes a rule from outside.
func (w *world) drift(ctx context.Context, r *result) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	seen := make(chan time.Time, 1)
	done := make(chan error, 1)
	w.backend = w.newBackend("")
	if _, _, err := w.backend.Preflight(ctx); err != nil {
		return err
	}
	go func() {
		done <- w.backend.Watch(ctx, func(proxy.Drift) {
			select {
			case seen <- time.Now():
			default:
			}
		})
	}()
	time.Sleep(500 * time.Millisecond) // it opens before the first Apply
	if _, err := w.sync(ctx); err != nil {
		return err
	}
	const quiet = 6 * time.Second
	before := cpu()
	time.Sleep(quiet)
	r.DriftCPU = (cpu() - before).Seconds() / quiet.Seconds()
	start := time.Now()
	if _, err := exec.Run(ctx, exec.Spec{Path: "iptables-" + w.Flavour, Netns: w.ns.Fd(),
		Args: []string{"-w", "5", "-t", "nat", "-R", "KUBE-MARK-MASQ", "1", "-j", "MARK", "--set-xmark", "0x8000/0x8000"}}); err != nil {
		return err
	}
	start = start.Add(time.Since(start)) // from when it stood there
	select {
	case at := <-seen:
		r.DriftSeen = max(0, at.Sub(start).Seconds())
	case <-time.After(30 * time.Second):
		return fmt.Errorf("a changed rule was not seen in 30 s")
	}
	w.backend.Forget()
	took, err := w.sync(ctx)
	if err != nil {
		return err
	}
	r.Repaired = r.DriftSeen + took
	cancel()
	return <-done
}

// race gives what was written to the same programs again, in turn with syncs of
// ours.
func (r *result) race(ctx context.Context, full []string, small [rounds][3][]string) error {
	var ours *world
	var floor *netns.NS
	for n := range max(r.Rounds, 1) {
		if n > 0 {
			ours.ns.Close()
			floor.Close()
		}
		var err error
		if ours, err = r.world(""); err != nil {
			return err
		}
		if floor, err = netns.New(); err != nil {
			return err
		}
		took, err := ours.sync(ctx)
		if err != nil {
			return err
		}
		bare, err := restore(ctx, r.Flavour, floor, full)
		if err != nil {
			return err
		}
		if n == 0 {
			r.Full, r.FloorFull = took, bare
		}
		r.Full, r.FloorFull = min(r.Full, took), min(r.FloorFull, bare)
	}
	defer ours.ns.Close()
	defer floor.Close()
	return r.raceSmall(ctx, ours, floor, small)
}

// capture makes a full sync and the small changes and returns the files with
// what each wrote.
func (r *result) capture(ctx context.Context, w *world, dir string) (full []string, small [rounds][3][]string, err error) {
	if _, err := w.sync(ctx); err != nil {
		return nil, small, err
	}
	r.Rules, r.Commits = w.report.Rules, w.report.Commits
	if full, err = texts(dir); err != nil {
		return nil, small, err
	}
	known := len(full)
	for n := range rounds {
		for i, do := range w.steps(n) {
			if _, err := do(ctx); err != nil {
				return nil, small, err
			}
			all, err := texts(dir)
			if err != nil {
				return nil, small, err
			}
			small[n][i], known = all[known:], len(all)
		}
	}
	r.Memory = peak()
	return full, small, nil
}

// raceSmall measures small changes, and beside each the smallest that the kernel
// can be asked for.
func (r *result) raceSmall(ctx context.Context, ours *world, floor *netns.NS, small [rounds][3][]string) error {
	var took, bare [3][]float64
	var least []float64
	for n := range rounds {
		for i, do := range ours.steps(n) {
			t, err := do(ctx)
			if err != nil {
				return err
			}
			b, err := restore(ctx, r.Flavour, floor, small[n][i])
			if err != nil {
				return err
			}
			took[i], bare[i] = append(took[i], t), append(bare[i], b)
		}
		if r.Flavour == "nft" {
			m, err := minimum(ours.ns, "nat")
			if err != nil {
				return err
			}
			least = append(least, m)
		}
	}
	r.Endpoint, r.Add, r.Remove = median(took[0]), median(took[1]), median(took[2])
	r.FloorEndpoint, r.FloorAdd, r.FloorRemove = median(bare[0]), median(bare[1]), median(bare[2])
	r.Minimum = median(least)
	return nil
}

// wrap fills a folder with the programs of iptables, of which restore keeps
// what it was given.
func wrap(dir, flavour string) error {
	for _, verb := range []string{"", "save", "restore"} {
		for _, fl := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
			name := xtables.Program(fl, xtables.IPv4, verb)
			script := "#!/bin/sh\nexec " + name + " \"$@\"\n"
			if verb == "restore" && fl.String() == flavour {
				script = "#!/bin/sh\nf=" + dir + "/text.$(date +%s%N)\ncat >$f\nexec " + name + " \"$@\" <$f\n"
			}
			if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
				return err
			}
		}
	}
	return nil
}

// texts lists what was kept, in order.
func texts(dir string) ([]string, error) {
	return filepath.Glob(filepath.Join(dir, "text.*")) // sorted
}

func restore(ctx context.Context, flavour string, ns *netns.NS, files []string) (float64, error) {
	var in []string
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return 0, err
		}
		in = append(in, string(text))
	}
	start := time.Now()
	for _, text := range in {
		if _, err := exec.Run(ctx, exec.Spec{Path: "iptables-" + flavour + "-restore", Args: []string{"-w", "5", "--noflush"},
			Stdin: strings.NewReader(text), Netns: ns.Fd()}); err != nil {
			return 0, err
		}
	}
	return time.Since(start).Seconds(), nil
}

func median(x []float64) float64 {
	if len(x) == 0 {
		return 0
	}
	slices.Sort(x)
	return x[len(x)/2]
}

// peak is the most memory in bytes that this process had resident.
func peak() int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return u.Maxrss << 10
}

// cpu is the time this process has used.
func cpu() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

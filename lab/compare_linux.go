package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kptrace/kptrace/internal/syscount"
	"github.com/kptrace/kptrace/proxy/kube/manifests"
	"github.com/kptrace/kptrace/trace"
)

const (
	compareClient = "pod/shop/client"
	compareDead   = "shop/web-3"
	comparePod    = "pod/shop/web-1"
)

// Compare makes a lab, measures one Case in it and ends it.
func Compare(ctx context.Context, cfg CompareConfig, c Case) (row ModeCase, err error) {
	row = ModeCase{Mode: c.Mode, Fault: c.Fault, Reroute: c.Reroute > 0}
	var logged lockedWriter
	var syncs syncLog
	logged.w = &syncs
	lc := cfg.Lab
	lc.Scenario = CompareScenario
	lc.Output = &logged
	lc.ProxyArgs = append([]string{"--verbose", "--mode", string(c.Mode)}, lc.ProxyArgs...)
	if c.Reroute > 0 {
		lc.ProxyArgs = append(lc.ProxyArgs, "--reroute-unanswered", c.Reroute.String())
	}
	l, err := Start(ctx, lc)
	if err != nil {
		return row, err
	}
	defer l.Close()
	ready, cancel := context.WithTimeout(ctx, cfg.Ready)
	defer cancel()
	if err := l.WaitReady(ready); err != nil {
		return row, err
	}
	logged.do(func() { row.SyncMs = float64(syncs.first()) / 1e6 })
	if c.Fault != FaultNone {
		if err := l.Fault(ctx, c.Fault, compareDead, 0); err != nil {
			return row, err
		}
	}
	if err := paced(ctx, l, cfg, &row); err != nil {
		return row, err
	}
	if err := fast(ctx, l, cfg, &row); err != nil {
		return row, err
	}
	if err := fastCalls(ctx, l, cfg, &row); err != nil {
		return row, err
	}
	if c.Fault == FaultNone && cfg.Bulk > 0 {
		err = bulk(ctx, l, cfg, &row)
	}
	return row, err
}

// paced makes connections at an even rate, and asks the node what it saw.
func paced(ctx context.Context, l *Lab, cfg CompareConfig, row *ModeCase) error {
	snap, err := manifests.New(manifests.Config{Dir: l.Dir(), Node: l.Cluster().Nodes[0].Name}).Load()
	if err != nil {
		return err
	}
	var seen Collector
	following, endFollow := context.WithCancel(ctx)
	defer endFollow()
	group, groupCtx := errgroup.WithContext(following)
	ready := make(chan struct{})
	group.Go(func() error {
		return l.Follow(groupCtx, func() { close(ready) }, func(m trace.Message) error {
			seen.Message(m)
			return nil
		})
	})
	group.Go(func() error {
		defer endFollow()
		select {
		case <-ready:
		case <-groupCtx.Done():
			return nil
		}
		r, err := loadFrom(ctx, l, cfg, Load{
			Conns: cfg.Connections, Rate: cfg.Rate, Concurrency: cfg.Connections, Patience: cfg.Patience,
		})
		if err != nil {
			return err
		}
		row.Failed, row.Connections = r.Failed, r.Done+r.Failed
		// The last ones are told of a moment later.
		select {
		case <-time.After(1500 * time.Millisecond):
		case <-ctx.Done():
		}
		return nil
	})
	if err := group.Wait(); err != nil {
		return err
	}
	for _, s := range Judge(seen.Evidence(l.Cluster(), snap)).Services {
		if s.Name != "web" {
			continue
		}
		row.Retried, row.EstablishedMs = s.Retried, s.EstablishedMs
		for _, e := range s.Endpoints {
			row.Shares = append(row.Shares, ModeShare{e.Pod, e.Share, e.ExpectedShare})
		}
	}
	return ctx.Err()
}

// loadFrom runs load in the client's namespace.
func loadFrom(ctx context.Context, l *Lab, cfg CompareConfig, what Load) (r LoadResult, err error) {
	what.Target = netip.MustParseAddrPort("10.96.0.10:80")
	err = l.Do(compareClient, func() (err error) {
		r, err = cfg.Load(ctx, what)
		return err
	})
	return r, err
}

// fast makes connections as fast as can be.
func fast(ctx context.Context, l *Lab, cfg CompareConfig, row *ModeCase) error {
	before, err := usage()
	if err != nil {
		return err
	}
	r, err := loadFrom(ctx, l, cfg, Load{Duration: cfg.Fast, Concurrency: 32, Patience: cfg.Patience})
	if err != nil {
		return err
	}
	after, err := usage()
	if err != nil {
		return err
	}
	row.ConnectionsPerSecond, row.fast = r.PerSecond, r.Done
	row.CPUSeconds = (after.cpu - before.cpu).Seconds()
	if r.Done > 0 {
		row.ContextSwitchesPerConnection = float64(after.switches-before.switches) / float64(r.Done)
	}
	return nil
}

// fastCalls counts system calls while connections are made as fast as can be.
func fastCalls(ctx context.Context, l *Lab, cfg CompareConfig, row *ModeCase) error {
	if !cfg.SystemCalls {
		return nil
	}
	var r LoadResult
	n, err := calls(cfg, func() (err error) {
		r, err = loadFrom(ctx, l, cfg, Load{Duration: cfg.Fast / 2, Concurrency: 32, Patience: cfg.Patience})
		return err
	})
	row.SystemCallsPerConnection = per(n, float64(r.Done))
	return err
}

// calls counts the system calls of this sandbox while do runs. Where they cannot
// be counted it returns nil.
func calls(cfg CompareConfig, do func() error) (n *uint64, err error) {
	if !cfg.SystemCalls {
		return nil, do()
	}
	c, err := syscount.Start()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	before, err := c.Read()
	if err != nil {
		return nil, err
	}
	if err := do(); err != nil {
		return nil, err
	}
	after, err := c.Read()
	after -= before
	return &after, err
}

// CanCountSystemCalls says why system calls cannot be counted here, nil if they
// can.
func CanCountSystemCalls() error {
	c, err := syscount.Start()
	if err == nil {
		c.Close()
	}
	return err
}

// per is n for each of so many, nil where either is missing.
func per(n *uint64, of float64) *float64 {
	if n == nil || of == 0 {
		return nil
	}
	each := float64(*n) / of
	return &each
}

// bulk moves bytes from a pod to the client through the Service.
func bulk(ctx context.Context, l *Lab, cfg CompareConfig, row *ModeCase) error {
	var listener net.Listener
	err := l.Do(comparePod, func() (err error) {
		listener, err = new(net.ListenConfig).Listen(ctx, "tcp4", ":9000")
		return err
	})
	if err != nil {
		return err
	}
	defer listener.Close()
	sent := make(chan error, 1)
	go func() {
		c, err := listener.Accept()
		if err == nil {
			defer c.Close()
			chunk := make([]byte, 256<<10)
			for left := cfg.Bulk; left > 0 && err == nil; {
				var n int
				n, err = c.Write(chunk[:min(left, int64(len(chunk)))])
				left -= int64(n)
			}
		}
		sent <- err
	}()
	var c net.Conn
	if err := l.Do(compareClient, func() (err error) {
		c, err = (&net.Dialer{Timeout: cfg.Patience}).DialContext(ctx, "tcp4", "10.96.0.11:9000")
		return err
	}); err != nil {
		return err
	}
	defer c.Close()
	before, err := usage()
	if err != nil {
		return err
	}
	var n int64
	var took time.Duration
	called, err := calls(cfg, func() (err error) {
		start, buf := time.Now(), make([]byte, 256<<10)
		n, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, c, buf)
		took = time.Since(start)
		return err
	})
	after, uerr := usage()
	if err := errors.Join(err, <-sent, uerr); err != nil {
		return err
	}
	mb := float64(n) / 1e6
	row.MBPerSecond, row.ContextSwitchesPerMB = mb/took.Seconds(), float64(after.switches-before.switches)/mb
	row.SystemCallsPerMB = per(called, mb)
	return nil
}

// used is what all processes of this sandbox used so far.
type used struct {
	cpu      time.Duration
	switches uint64
}

// usage reads /proc, in which there are no processes but the lab's.
func usage() (u used, err error) {
	tasks, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*")
	if err != nil {
		return u, err
	}
	for _, dir := range tasks {
		stat, err := os.ReadFile(dir + "/stat")
		if err != nil {
			continue // it has ended
		}
		// After the name, which may hold anything: utime and stime are the
		// 12th and 13th (proc(5)), in hundredths of a second.
		if i := bytes.LastIndexByte(stat, ')'); i >= 0 {
			f := strings.Fields(string(stat[i+1:]))
			for _, s := range f[11:13] {
				n, err := strconv.ParseInt(s, 10, 64)
				if err != nil {
					return u, fmt.Errorf("lab: reading %s: %w", dir, err)
				}
				u.cpu += time.Duration(n) * 10 * time.Millisecond
			}
		}
		status, err := os.ReadFile(dir + "/status")
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(status)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.HasSuffix(name, "voluntary_ctxt_switches") {
				n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 64)
				if err != nil {
					return u, fmt.Errorf("lab: reading %s: %w", dir, err)
				}
				u.switches += n
			}
		}
	}
	return u, nil
}

// lockedWriter lets one at a time write.
type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

func (l *lockedWriter) do(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f()
}

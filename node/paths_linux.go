package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/selection"
)

const (
	// pathPatience is how long a follower waits for tracing to be in place.
	pathPatience = 25 * time.Second
	// pathAgain is the wait after tracing of paths failed, while somebody asks.
	pathAgain = 5 * time.Second
	// pathRefresh is how often the addresses in the kernel's sets are renewed.
	pathRefresh = 4 * time.Second
)

// pathTracer traces the paths of packets while followers ask for them, and
// nothing otherwise. Like the tracer it may fail without harm to others.
type pathTracer struct {
	readOnly bool
	tools    xtables.Tools
	flavour  func(context.Context) (xtables.Flavour, error)
	ipv6     func() bool
	buffer   int
	views    func() []*proxy.View
	owner    *owner
	tracer   *tracer
	logger   *slog.Logger

	mu      sync.Mutex // guards what follows
	asked   []*pathAsk
	changed chan struct{}

	live atomic.Pointer[pathSession]
	// fault is what ended the last session, nil if nothing did.
	fault atomic.Pointer[error]
}

// pathAsk is one follower.
type pathAsk struct {
	req trace.Request
	// done gets nil once its packets are traced, or why they cannot be.
	done chan error
	told bool
}

func newPathTracer(n *node) *pathTracer {
	p := &pathTracer{
		readOnly: n.cfg.ReadOnly,
		views:    n.syncer.Views, owner: n.owner, tracer: n.tracer, logger: n.cfg.Logger, changed: make(chan struct{}, 1),
		buffer: n.cfg.PathBuffer, ipv6: func() bool { return false },
	}
	if b, ok := n.cfg.Backend.(interface{ IPv6() bool }); ok {
		p.ipv6 = b.IPv6
	}
	p.flavour = func(ctx context.Context) (xtables.Flavour, error) {
		if fl, err := xtables.ParseFlavour(n.variant); err == nil {
			return fl, nil
		}
		fl, _, err := p.tools.Detect(ctx)
		return fl, err
	}
	return p
}

// ask has the paths of a request's flows traced until release is called. It
// returns once they are, or with the reason why they are not; release is never
// nil.
func (p *pathTracer) ask(ctx context.Context, req *trace.Request) (release func(), err error) {
	if p.readOnly {
		return func() {}, errors.New("node: paths need rules of ours, and this node is read-only")
	}
	a := &pathAsk{req: *req, done: make(chan error, 1)}
	p.change(func() { p.asked = append(p.asked, a) })
	release = sync.OnceFunc(func() {
		p.change(func() { p.asked = slices.DeleteFunc(p.asked, func(o *pathAsk) bool { return o == a }) })
	})
	ctx, cancel := context.WithTimeout(ctx, pathPatience)
	defer cancel()
	select {
	case err = <-a.done:
	case <-ctx.Done():
		err = fmt.Errorf("node: tracing of paths is not in place: %w", ctx.Err())
	}
	return release, err
}

// settle returns when the paths of packets that were read before a time are with
// their flows, or when ctx ends. One that may be of no flow is not waited for long.
func (p *pathTracer) settle(ctx context.Context, before time.Time) {
	for ctx.Err() == nil {
		s := p.live.Load()
		if s == nil {
			return
		}
		if d := s.joinedUntil.Load(); d > before.UnixNano() {
			return
		}
		pause(ctx, pathTick)
	}
}

func (p *pathTracer) change(f func()) {
	p.mu.Lock()
	f()
	p.mu.Unlock()
	select {
	case p.changed <- struct{}{}:
	default:
	}
}

// askers returns the followers there are.
func (p *pathTracer) askers() []*pathAsk {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.asked)
}

// tell answers the followers who wait.
func (p *pathTracer) tell(asks []*pathAsk, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range asks {
		if !a.told {
			a.told = true
			a.done <- err
		}
	}
}

// want is what all followers together want traced.
func (p *pathTracer) want(asks []*pathAsk) selection.Want {
	var w selection.Want
	views := p.views()
	if len(views) == 0 {
		return w
	}
	local := proxy.InterfaceAddrs()
	for _, a := range asks {
		one := selection.Of(views[0].Snapshot, &a.req.Filter, local)
		one.Packets = a.req.Path.Packets
		if views[0].Mode == proxy.Userspace {
			one.To = append(one.To, one.From...) // the proxy's own connections
		}
		w = w.Merge(one)
	}
	return w
}

// run traces whenever somebody asks, until ctx ends.
func (p *pathTracer) run(ctx context.Context) {
	err := guard(func() error { return selection.Reap(ctx, p.tools) })()
	for _, name := range [...]string{nfLog4, nfLog6} {
		err = errors.Join(err, p.owner.reset(name))
	}
	if err != nil && ctx.Err() == nil {
		p.logger.Warn("what an earlier run traced could not be removed; it times out by itself", "err", err)
	}
	for ctx.Err() == nil {
		asks := p.askers()
		if len(asks) == 0 {
			select {
			case <-ctx.Done():
				return
			case <-p.changed:
			}
			continue
		}
		err := guard(func() error { return p.session(ctx) })()
		p.live.Store(nil)
		if err == nil {
			p.fault.Store(nil)
			continue
		}
		p.fault.Store(&err)
		if ctx.Err() == nil {
			p.logger.Error("paths cannot be traced; nothing else is affected", "err", err)
		}
		p.tell(p.askers(), err)
		pause(ctx, pathAgain)
	}
}

// undo removes what a run that is over may have left.
func undoPaths(ctx context.Context) error {
	return guard(func() error { return selection.Reap(ctx, xtables.Tools{}) })()
}

// sources are the sources at work.
func (p *pathTracer) sources() []trace.SourceStats {
	s := p.live.Load()
	if s == nil {
		return nil
	}
	return s.stats()
}

// status says in sentences what is traced and what cannot be.
func (p *pathTracer) status() []string {
	var said []string
	s, fault := p.live.Load(), p.fault.Load()
	switch {
	case p.readOnly:
		said = append(said, "not traced: this node is read-only")
	case s != nil:
		said = append(said, s.status())
		if err := s.late.Load(); err != nil && *err != nil {
			said = append(said, "without rules of raw that stand before those which trace: "+(*err).Error())
		}
		if err := s.wires.fault.Load(); err != nil {
			said = append(said, "without wire points: "+(*err).Error())
		}
		if err := s.drops.fault.Load(); err != nil {
			said = append(said, "without the kernel's reasons for drops: "+(*err).Error())
		}
	case fault != nil:
		said = append(said, "could not be traced the last time somebody asked: "+(*fault).Error())
	default:
		said = append(said, "traced when a follower asks for them (follow -o path)")
	}
	return said
}

var errNoRules = errors.New("no Services are programmed yet")

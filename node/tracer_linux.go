package node

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/recent"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
	"github.com/kptrace/kptrace/trace/source/ctevent"
	"github.com/kptrace/kptrace/trace/source/ipvs"
	"github.com/kptrace/kptrace/trace/source/nflog"
	"github.com/kptrace/kptrace/trace/source/userspace"
)

const (
	// queueBatches bounds what may wait between the sources and the
	// correlator; a batch is what one receive brought.
	queueBatches = 512
	// standstill is a gap between ticks that means this process did not run.
	standstill = time.Second
	// restartAfter is the wait before a tracer that failed starts again. It
	// doubles up to restartMost while the tracer keeps failing early.
	restartAfter = time.Second
	restartMost  = 30 * time.Second
)

// tracer joins the sources, the correlator and what keeps its Flows. It starts
// again when it fails; ring and history outlive that.
type tracer struct {
	cfg     Config
	views   func() []*proxy.View
	ring    *trace.Ring
	history *trace.History
	logger  *slog.Logger

	queue chan *batch
	// stuck has the connections that nobody answers, nil where none are to be
	// sent elsewhere.
	stuck chan unanswered
	pool  sync.Pool
	calls chan func(*correlate.Correlator)
	asks  chan conntrack.Tuple
	wants func(*trace.Flow) bool // an exporter will have this flow, nil for none

	requests requests

	// decoding, by source, and correlating are nanoseconds spent.
	decoding    [16]atomic.Int64
	correlating atomic.Int64

	taps     taps
	losses   lossBox
	watchers atomic.Int64 // followers at the moment
	direct   atomic.Int64 // those of them that want connections past Services
	paths    atomic.Bool  // paths are being traced
	restarts atomic.Uint64
	failed   atomic.Pointer[error] // what ended the last life, nil in the first
	live     atomic.Pointer[session]

	// The correlator's allowance of questions.
	tokens   float64
	refilled time.Time
}

// session is what one start of the tracer made.
type session struct {
	sources []trace.Source
	ipvs    *ipvs.Source // nil in other modes
	stats   func() correlate.Stats
	direct  func() map[trace.Target]trace.Direct
}

// batch is the events of one Frame.
type batch struct{ events []trace.Event }

func newTracer(cfg Config, views func() []*proxy.View) *tracer {
	t := &tracer{
		cfg: cfg, views: views, logger: cfg.Logger,
		ring: trace.NewRing(1 << 14),
		history: trace.NewHistory(trace.HistoryConfig{
			Failures: cfg.HistoryFailures, Successes: cfg.HistorySuccesses,
		}),
		queue: make(chan *batch, queueBatches),
		calls: make(chan func(*correlate.Correlator)),
		asks:  make(chan conntrack.Tuple, 1024),

		requests: requests{queue: make(chan request, requestQueue)},
	}
	t.pool.New = func() any { return new(batch) }
	if _, ok := cfg.rerouter(); ok {
		t.stuck = make(chan unanswered, maxStuck)
	}
	return t
}

// run traces until ctx ends. It calls ready once the sources listen, or failed
// to; the proxy waits for that, so that no connection made under its rules is
// missed.
func (t *tracer) run(ctx context.Context, ready func()) {
	wait := restartAfter
	for {
		began := time.Now()
		err := t.once(ctx, ready)
		ready()
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > restartMost {
			wait = restartAfter
		}
		t.restarts.Add(1)
		t.failed.Store(&err)
		t.logger.Error("tracing failed; Services are not affected; starting again", "in", wait, "err", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		wait = min(2*wait, restartMost)
	}
}

// once is one life of the tracer. It ends with ctx or the first failure.
func (t *tracer) once(ctx context.Context, ready func()) error {
	log := nflog.New(nflog.Config{Group: t.cfg.NFLogGroup, Lookup: t.lookup, OnLoss: t.losses.add})
	ct := ctevent.New(ctevent.Config{OnLoss: t.losses.add})
	asked := newInquirer(t.views, t.do)
	local := new(localCache)
	c := correlate.New(correlate.Config{
		RecentList: recent.Limit(),
		Inquire:    asked.ask, EntriesDecide: t.cfg.ReadOnly,
		Node: t.cfg.Name, Views: t.views, Emit: t.emit, Ask: t.ask,
		Watched:        func() bool { return t.watchers.Load() > 0 },
		Counters:       t.wants,
		Local:          local.has,
		Direct:         func() bool { return t.direct.Load() > 0 },
		Paths:          t.paths.Load,
		MasqueradeMark: t.cfg.MasqueradeMark, MaxFlows: maxFlows, Hold: hold,
		UnansweredAfter: t.cfg.unansweredAfter(),
	})
	sources := []trace.Source{log, ct}
	var relayed *userspace.Source
	if r, ok := t.cfg.Backend.(proxy.Relay); ok {
		relayed = userspace.New(userspace.Config{Relay: r, Lookup: t.lookup, OnLoss: t.losses.add})
		sources = append(sources, relayed)
	}
	var balanced *ipvs.Source
	if t.cfg.Backend.Mode() == proxy.IPVS {
		balanced = ipvs.New(ipvs.Config{})
		sources = append(sources, balanced)
	}
	t.live.Store(&session{sources: sources, ipvs: balanced, stats: c.Stats, direct: c.Direct})

	g, ctx := errgroup.WithContext(ctx)
	var listening sync.WaitGroup
	start := func(src trace.Source, dec trace.Decoder) {
		listening.Add(1)
		var once sync.Once
		g.Go(guard(func() error {
			defer once.Do(listening.Done)
			return src.Run(ctx, func() { once.Do(listening.Done) }, func(f trace.Frame) { t.enqueue(dec, f) })
		}))
	}
	start(log, log.Decoder())
	start(ct, ct.Decoder())
	if relayed != nil {
		start(relayed, relayed.Decoder())
	}
	if balanced != nil {
		start(balanced, balanced.Decoder())
	}
	g.Go(guard(func() error { return t.correlate(ctx, c) }))
	g.Go(guard(func() error { return asked.run(ctx) }))
	g.Go(guard(func() error { return asked.witness.run(ctx) }))
	g.Go(guard(func() error { return t.seedAffinity(ctx) }))
	g.Go(guard(func() error { return t.watchTable(ctx) }))
	g.Go(guard(func() error {
		listening.Wait()
		ready()
		return t.askKernel(ctx)
	}))
	return g.Wait()
}

// guard turns a panic into an error, so that a fault in tracing is a restart
// of the tracer and nothing more.
func guard(f func() error) func() error {
	return func() (err error) {
		defer func() {
			if v := recover(); v != nil {
				err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
			}
		}()
		return f()
	}
}

// lookup finds the rule of an NFLOG prefix in the generations at hand.
func (t *tracer) lookup(prefix []byte) *proxy.Rule {
	for _, v := range t.views() {
		if r := v.Program.Index().Lookup(prefix); r != nil {
			return r
		}
	}
	return nil
}

// enqueue decodes a frame and hands its events on. It never waits: what finds
// no room is dropped and counted.
func (t *tracer) enqueue(dec trace.Decoder, f trace.Frame) {
	t.taps.frame(f)
	b := t.pool.Get().(*batch)
	began := time.Now()
	b.events = dec.Decode(f, b.events[:0])
	t.decoding[f.Source&15].Add(int64(time.Since(began)))
	if len(b.events) == 0 {
		t.pool.Put(b)
		return
	}
	select {
	case t.queue <- b:
	default:
		t.losses.add(trace.Loss{
			Source: f.Source, Where: "queue", Events: uint64(len(b.events)),
			From: f.Time - int64(reportDelay), To: f.Time,
		})
		t.pool.Put(b)
	}
}

// correlate is the only goroutine that touches c.
func (t *tracer) correlate(ctx context.Context, c *correlate.Correlator) error {
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	rerouter, _ := t.cfg.rerouter()
	last := time.Now()
	var quiet time.Time // no timer fires before
	for {
		select {
		case <-ctx.Done():
			return nil
		case b := <-t.queue:
			if t.cfg.inject != nil {
				t.cfg.inject()
			}
			began := time.Now()
			t.tell(c)
			for i := range b.events {
				if e := &b.events[i]; e.Kind == trace.KindDestroy && t.stuck != nil {
					rerouter.RerouteDestroyed(e.Tuple, e.Status)
				}
				c.Handle(&b.events[i])
			}
			t.correlating.Add(int64(time.Since(began)))
			t.pool.Put(b)
		case q := <-t.requests.queue:
			c.Carried(q.tuple, q.Carried)
		case f := <-t.calls:
			f(c)
		case now := <-tick.C:
			t.tell(c)
			// We stood still (SIGSTOP, a suspended machine): first read what
			// happened meanwhile, or everything looks timed out.
			if now.Sub(last) > standstill {
				quiet = now.Add(standstill)
			}
			last = now
			if now.After(quiet) {
				c.Advance(now)
			}
		}
	}
}

// tell passes on losses, before the events that came after them.
func (t *tracer) tell(c *correlate.Correlator) {
	for _, l := range t.losses.take() {
		c.Lost(l)
		t.taps.loss(l)
		t.ring.PublishLoss(l)
	}
}

// emit keeps and passes on an update.
func (t *tracer) emit(f *trace.Flow) {
	if f.Direct() { // for those who asked, and nobody else
		t.ring.Publish(f)
		return
	}
	t.history.Put(f)
	t.ring.Publish(f)
	t.tellStuck(f)
}

// localFor is how long the addresses of the node that were read serve.
const localFor = 5 * time.Second

// localCache knows the node's addresses, as of a while ago. It has one user.
type localCache struct {
	read time.Time
	is   func(netip.Addr) bool
}

func (l *localCache) has(a netip.Addr) bool {
	if l.is == nil || time.Since(l.read) > localFor {
		l.read = time.Now()
		is, err := localAddrs()
		if err != nil && l.is == nil {
			return false
		}
		if err == nil {
			l.is = is
		}
	}
	return l.is(a)
}

// straight returns how many connections were made to each endpoint past Services.
func (t *tracer) straight() map[trace.Target]trace.Direct {
	if s := t.live.Load(); s != nil {
		return s.direct()
	}
	return nil
}

// do runs f on the correlator, if one is there and not stalled.
func (t *tracer) do(ctx context.Context, f func(*correlate.Correlator)) error {
	done := make(chan struct{})
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	select {
	case t.calls <- func(c *correlate.Correlator) { defer close(done); f(c) }:
		<-done
		return nil
	case <-ctx.Done():
		return fmt.Errorf("node: the tracer does not answer: %w", ctx.Err())
	}
}

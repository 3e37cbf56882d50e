package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
	"github.com/kptrace/kptrace/trace/path"
	"github.com/kptrace/kptrace/trace/selection"
	"github.com/kptrace/kptrace/trace/source/legacytrace"
	"github.com/kptrace/kptrace/trace/source/nftrace"
)

const (
	// pathTick is how often paths that are complete are looked for.
	pathTick = 25 * time.Millisecond
	// pathQueue bounds the frames that wait to be joined, in bytes.
	pathQueue = 128 << 20
	// pathStray is how long a path without a flow is taken to wait for one.
	pathStray = time.Second
	// pathEnd is how long after the selection is emptied reports may still come.
	pathEnd = 600 * time.Millisecond
	// reloadLeast is the least time between two readings of all rules.
	reloadLeast = 500 * time.Millisecond
)

// traceSource is a source of rule hits.
type traceSource interface {
	trace.Source
	hits() trace.HitDecoder
}

type nftSource struct{ *nftrace.Source }

func (s nftSource) hits() trace.HitDecoder { return s.Decoder() }

type legacySource struct{ *legacytrace.Source }

func (s legacySource) hits() trace.HitDecoder { return s.Decoder() }

// pathSession traces from the first follower's coming to the last one's going.
type pathSession struct {
	p       *pathTracer
	flavour xtables.Flavour
	source  traceSource
	pathJoin
	devices devices
	sel     *selection.Selection
	wires   wires
	drops   drops
	reading context.Context // what the sources run in

	frames frameQueue
	losses lossBox
	view   *proxy.View
	// For status.
	entries atomic.Int64
	packets atomic.Int64
	stray   atomic.Uint64 // paths without a flow
	joined  atomic.Pointer[path.Stats]

	// joinedUntil is the time before which nothing is under way, in nanoseconds
	// since 1970.
	joinedUntil atomic.Int64
	late        atomic.Pointer[error] // why what stands before our rules in raw is not seen
}

// session runs one; it ends when nobody asks any more, with ctx, or with the
// first failure, and leaves nothing.
func (p *pathTracer) session(ctx context.Context) (err error) {
	fl, err := p.flavour(ctx)
	if err != nil {
		return err
	}
	s := &pathSession{p: p, flavour: fl}
	s.frames.wake = make(chan struct{}, 1)
	if fl == xtables.NFT {
		s.source = nftSource{nftrace.New(nftrace.Config{OnLoss: s.losses.add, ReceiveBuffer: p.buffer})}
	} else {
		s.source = legacySource{legacytrace.New(legacytrace.Config{OnLoss: s.losses.add, ReceiveBuffer: p.buffer})}
	}
	s.begin(s.devices.name, s.endpoint)
	s.sel = selection.New(selection.Config{Tools: p.tools, Flavour: fl, IPv6: p.ipv6()})

	// The source outlives ctx for as long as it takes to end in order.
	reading, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	g, reading := errgroup.WithContext(reading)
	listening := make(chan struct{})
	g.Go(guard(func() error {
		return s.source.Run(reading, sync.OnceFunc(func() { close(listening) }), s.put)
	}))
	select {
	case <-listening:
	case <-reading.Done():
		return g.Wait()
	}
	s.reading = reading
	defer s.wires.end()
	defer s.drops.end()
	p.tracer.paths.Store(true)
	defer p.tracer.paths.Store(false)
	p.live.Store(s) // a recorder wants to know it before the first frame
	err = s.setUp(ctx)
	if err == nil {
		err = s.loop(ctx, reading)
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoPatience)
	defer cancel()
	err = errors.Join(err, s.tearDown(end))
	s.wires.end()
	s.drops.end()
	stop()
	err = errors.Join(err, g.Wait())
	s.drain()
	s.joiner.Flush(time.Now())
	s.deliver(end, true)
	s.tellLosses()
	return err
}

// put takes what a source read, from any goroutine. It never waits.
func (s *pathSession) put(f trace.Frame) {
	s.p.tracer.taps.frame(f)
	s.frames.put(f)
}

// setUp selects for the followers there are.
func (s *pathSession) setUp(ctx context.Context) error {
	if s.flavour == xtables.Legacy {
		for _, name := range s.nfLogs() {
			if err := s.p.owner.set(name, "nfnetlink_log"); err != nil {
				return fmt.Errorf("%w: TRACE of iptables-legacy reports through it", err)
			}
		}
	}
	return s.choose(ctx)
}

// nfLog4 and nfLog6 say who logs what iptables-legacy traces.
const (
	nfLog4 = "net/netfilter/nf_log/2"
	nfLog6 = "net/netfilter/nf_log/10"
)

// nfLogs are the sysctls that send legacy traces to nfnetlink_log.
func (s *pathSession) nfLogs() []string {
	names := []string{nfLog4}
	if s.p.ipv6() {
		names = append(names, nfLog6)
	}
	return names
}

// tearDown undoes all that setUp did. What the kernel sent until then is read.
func (s *pathSession) tearDown(ctx context.Context) error {
	err := s.sel.Stop()
	for end := time.Now().Add(pathEnd); time.Now().Before(end); {
		s.drain()
		s.joiner.Advance(time.Now())
		s.deliver(ctx, false)
		time.Sleep(pathTick)
	}
	err = errors.Join(err, s.sel.Close(ctx))
	if s.flavour == xtables.Legacy {
		for _, name := range s.nfLogs() {
			err = errors.Join(err, s.p.owner.reset(name))
		}
	}
	if err != nil {
		return fmt.Errorf("node: what was set up to trace paths could not be removed, run kptrace cleanup: %w", err)
	}
	return nil
}

// choose makes the kernel trace what the followers want.
func (s *pathSession) choose(ctx context.Context) error {
	asks := s.p.askers()
	if len(asks) == 0 {
		return nil
	}
	if len(s.p.views()) == 0 {
		s.p.tell(asks, errNoRules)
		return nil
	}
	w := s.p.want(asks)
	if err := s.sel.Set(ctx, w); err != nil {
		return err
	}
	late := s.sel.Late()
	s.late.Store(&late)
	// The selection's own rules count where rules go by number.
	if s.packets.Swap(int64(w.Packets)) != int64(w.Packets) || s.rules.Newest() == nil {
		if err := s.load(ctx); err != nil {
			return err
		}
	}
	s.drops.look(s.reading, s.put, s.losses.add)
	s.wires.look(s.reading, &w, s.put, s.losses.add)
	s.entries.Store(int64(len(w.To)))
	s.p.tell(asks, nil)
	return nil
}

// load reads the rules that are live.
func (s *pathSession) load(ctx context.Context) error {
	g, err := path.Load(ctx, path.LoadConfig{Tools: s.p.tools, Flavour: s.flavour, IPv6: s.p.ipv6()})
	if err != nil {
		return err
	}
	s.rules.Add(g)
	return nil
}

// loop joins until nobody asks.
func (s *pathSession) loop(ctx, reading context.Context) error {
	tick := time.NewTicker(pathTick)
	defer tick.Stop()
	refresh := time.NewTicker(pathRefresh)
	defer refresh.Stop()
	loaded := make(chan error, 1)
	loading, lastLoad := false, time.Now()
	s.newView()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-reading.Done():
			return nil // its error is told by who waits for it
		case <-s.p.changed:
			if len(s.p.askers()) == 0 {
				return nil
			}
			if err := s.choose(ctx); err != nil && ctx.Err() == nil {
				return err
			}
		case <-refresh.C:
			if err := s.choose(ctx); err != nil && ctx.Err() == nil {
				return err
			}
		case <-s.frames.wake:
			s.drain()
		case err := <-loaded:
			loading = false
			if err != nil && ctx.Err() == nil {
				s.p.logger.Warn("rules on paths may lack their text", "err", err)
			}
		case now := <-tick.C:
			s.drain()
			s.joiner.Advance(now)
			s.deliver(ctx, false)
			s.joinedUntil.Store(s.underWay(now))
			s.tellLosses()
			if changed := s.newView(); (changed || s.rules.Stale()) && !loading && now.Sub(lastLoad) > reloadLeast {
				loading, lastLoad = true, now
				go func() { loaded <- s.load(ctx) }()
				if changed {
					if err := s.choose(ctx); err != nil && ctx.Err() == nil {
						return err
					}
				}
			} else if changed {
				s.view = nil // look again when it is time
			}
		}
	}
}

// newView reports whether another generation of intent has been programmed.
func (s *pathSession) newView() bool {
	for _, v := range s.p.views() {
		if v.Done.IsZero() {
			continue
		}
		if v != s.view {
			s.view = v
			return true
		}
		return false
	}
	return false
}

// drain joins what has been read.
func (s *pathSession) drain() {
	for _, f := range s.frames.take() {
		switch f.Source {
		case trace.Drops:
			s.drop(s.drops.decoder, f)
		case trace.Wire:
			s.sight(s.wires.decoder, f)
		default:
			s.hit(s.source.hits(), f)
		}
	}
	if n := s.frames.lost(); n > 0 {
		now := time.Now().UnixNano()
		s.losses.add(trace.Loss{Source: s.source.ID(), From: now - int64(reportDelay), To: now, Events: n, Where: "queue"})
	}
	stats := s.joiner.Stats()
	s.joined.Store(&stats)
}

// deliver gives paths to their flows. One that has none yet is kept for a while.
func (s *pathSession) deliver(ctx context.Context, last bool) {
	if len(s.ready) == 0 {
		return
	}
	var left []path.Joined
	err := s.p.tracer.do(ctx, func(c *correlate.Correlator) {
		var strays uint64
		left, strays = s.give(c, time.Now(), last)
		s.stray.Add(strays)
	})
	if err != nil && len(s.ready) < 1<<16 && !last {
		return // the correlator is busy or starting again
	}
	s.ready = left
}

// underWay is when the oldest packet was read whose path is not with its flow, now
// if there is none.
func (s *pathSession) underWay(now time.Time) int64 {
	oldest := now.UnixNano()
	if begun := s.joiner.Oldest(); begun != 0 {
		oldest = min(oldest, begun)
	}
	for i := range s.ready {
		if at := s.ready[i].At; at > now.UnixNano()-int64(pathStray) {
			oldest = min(oldest, at)
		}
	}
	return oldest
}

// tellLosses passes on what was lost. Decisions do not depend on it, so the
// correlator need not know.
func (s *pathSession) tellLosses() {
	for _, l := range s.losses.take() {
		s.joiner.Lost(l)
		s.p.tracer.taps.loss(l)
		s.p.tracer.losses.count(l)
		s.p.tracer.ring.PublishLoss(l)
	}
}

func (s *pathSession) stats() []trace.SourceStats {
	list := []trace.SourceStats{s.source.Stats()}
	for _, x := range []*pathExtra{&s.wires.pathExtra, &s.drops.pathExtra} {
		if stats := x.live.Load(); stats != nil {
			list = append(list, (*stats)())
		}
	}
	return list
}

func (s *pathSession) status() string {
	j := s.joined.Load()
	if j == nil {
		j = &path.Stats{}
	}
	packets := "all packets"
	if n := s.packets.Load(); n > 0 {
		packets = fmt.Sprintf("the first %d of each direction", n)
	}
	return fmt.Sprintf("traced by TRACE of iptables-%s, followers %d, addresses %d: %s; %d seen, %d of them incomplete",
		s.flavour, len(s.p.askers()), s.entries.Load(), packets, j.Paths, j.Incomplete)
}

// endpoint names the pod at an address.
func (s *pathSession) endpoint(ep netip.AddrPort) string {
	views := s.p.views()
	if len(views) == 0 {
		return ""
	}
	return views[0].Snapshot.Pods[ep.Addr()].Name
}

// devices remembers the names of interfaces.
type devices struct {
	names map[uint32]string
	read  time.Time
}

func (d *devices) name(index uint32) string {
	if n, ok := d.names[index]; ok {
		return n
	}
	if time.Since(d.read) < time.Second {
		return ""
	}
	d.read = time.Now()
	list, err := net.Interfaces()
	if err != nil {
		return ""
	}
	d.names = make(map[uint32]string, len(list))
	for i := range list {
		d.names[uint32(list[i].Index)] = list[i].Name
	}
	return d.names[index]
}

// frameQueue holds frames between who reads and who joins. put never waits.
type frameQueue struct {
	wake chan struct{}

	mu      sync.Mutex // guards what follows
	frames  []trace.Frame
	bytes   int
	dropped uint64
}

func (q *frameQueue) put(f trace.Frame) {
	f.Data = bytes.Clone(f.Data)
	q.mu.Lock()
	if q.bytes+len(f.Data) > pathQueue {
		q.dropped += messages(f.Data)
	} else {
		q.frames = append(q.frames, f)
		q.bytes += len(f.Data)
	}
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// messages counts netlink messages.
func messages(data []byte) (n uint64) {
	for m := nfnl.NewMessages(data); m.Next(); {
		n++
	}
	return n
}

func (q *frameQueue) take() []trace.Frame {
	q.mu.Lock()
	defer q.mu.Unlock()
	f := q.frames
	q.frames, q.bytes = nil, 0
	return f
}

func (q *frameQueue) lost() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := q.dropped
	q.dropped = 0
	return n
}

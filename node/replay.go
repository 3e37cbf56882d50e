package node

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"
	"slices"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/liverules"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
	"github.com/kptrace/kptrace/trace/record"
	"github.com/kptrace/kptrace/trace/source/ctevent"
	"github.com/kptrace/kptrace/trace/source/drop"
	"github.com/kptrace/kptrace/trace/source/ipvs"
	"github.com/kptrace/kptrace/trace/source/legacytrace"
	"github.com/kptrace/kptrace/trace/source/nflog"
	"github.com/kptrace/kptrace/trace/source/nftrace"
	"github.com/kptrace/kptrace/trace/source/userspace"
	"github.com/kptrace/kptrace/trace/source/wire"
)

// What the correlator lives by, live and in a replay.
const (
	// maxFlows bounds the connections the correlator knows at once.
	maxFlows = 1 << 16
	// tickEvery is how often timers are looked at and losses collected.
	tickEvery = 50 * time.Millisecond
	// hold is how long one source waits for the other; on a busy machine a
	// reader may not run for a good while.
	hold = 400 * time.Millisecond
	// pathSlack is how much longer a path waits in a replay for what is said of its
	// packet: a live node that was kept from reading finds it all there at once.
	pathSlack = time.Second
)

// ReplayConfig says how a recording is looked at again.
type ReplayConfig struct {
	Recording *record.Reader
	// Program makes what a generation of intent meant, for modes whose rules do
	// not tell: nil, or nil as its answer, leaves it to the rules.
	Program func(*record.State) proxy.Program
	// Direct has connections to endpoints past Services emitted too; they are
	// counted anyway.
	Direct bool
	// Emit gets every update of a flow, Loss what was missed and Packet the
	// packets that rules reported, from the IP header on, as much of them as
	// was copied; the bytes are valid until it returns. The last two may be nil.
	Emit   func(*trace.Flow)
	Loss   func(trace.Loss)
	Packet func(*trace.Event, []byte)
}

// ReplayStats says what a recording held.
type ReplayStats struct {
	Frames, Events uint64
	States         int
	First, Last    time.Time
	// Skipped counts frames of sources that this version does not know.
	Skipped uint64
	// Paths counts the paths of packets, StrayPaths those that belong to no
	// connection in the recording.
	Paths, StrayPaths uint64
	// Dropped are frames that the recorder did not come to.
	Dropped uint64
	// Direct counts the connections past Services, by endpoint, and View is the
	// newest generation, nil if there was none.
	Direct map[trace.Target]trace.Direct
	View   *proxy.View
}

// Replay sends a recording through the decoders and the correlator of a live
// node, by the clock of the recording. It works on any system. An error may come
// with what was readable before it: see package record.
func Replay(cfg ReplayConfig) (ReplayStats, error) {
	h := cfg.Recording.Header()
	r := &replay{cfg: cfg, decoders: map[trace.SourceID]trace.Decoder{}, tracers: map[trace.SourceID]trace.HitDecoder{}}
	r.c = correlate.New(correlate.Config{
		Node: h.Node, Views: func() []*proxy.View { return r.views }, Emit: cfg.Emit, Hold: hold,
		MasqueradeMark: h.MasqueradeMark, MaxFlows: maxFlows, EntriesDecide: h.EntriesDecide,
		Paths: func() bool { return r.hasPaths }, Direct: func() bool { return cfg.Direct },
		Local: func(a netip.Addr) bool { return a.IsLoopback() || slices.Contains(h.Addrs, a) },
	})
	reports := nflog.NewDecoder(r.lookup)
	reports.Packets = cfg.Packet
	r.decoders[trace.NFLog] = reports
	r.decoders[trace.Conntrack] = ctevent.NewDecoder()
	r.decoders[trace.IPVS] = ipvs.NewDecoder()
	r.decoders[trace.Userspace] = userspace.NewDecoder(r.lookup)
	r.begin(func(i uint32) string { return r.names.Devices[i] }, r.endpoint)
	r.tracers[trace.NFTrace], r.tracers[trace.LegacyTrace] = nftrace.NewDecoder(), legacytrace.NewDecoder()
	r.wire, r.drops = wire.NewDecoder(), drop.NewDecoder(nil)
	err := r.run()
	if !r.stats.Last.IsZero() {
		r.joiner.Flush(r.stats.Last)
		r.c.Advance(r.stats.Last.Add(hold)) // what the paths' flows wait for
		r.deliver(r.stats.Last, true)
		r.c.Advance(r.stats.Last.Add(time.Minute)) // what is decided by waiting
		r.c.Flows(func(*trace.Flow) bool { return true })
	}
	r.stats.Direct = r.c.Direct()
	if len(r.views) > 0 {
		r.stats.View = r.views[0]
	}
	return r.stats, err
}

type replay struct {
	cfg      ReplayConfig
	c        *correlate.Correlator
	decoders map[trace.SourceID]trace.Decoder
	views    []*proxy.View
	events   []trace.Event
	advanced int64
	stats    ReplayStats

	pathJoin
	tracers  map[trace.SourceID]trace.HitDecoder
	wire     *wire.Decoder
	drops    *drop.Decoder
	names    record.Names
	hasPaths bool
}

// endpoint names the pod at an address.
func (r *replay) endpoint(ep netip.AddrPort) string {
	if len(r.views) == 0 {
		return ""
	}
	return r.views[0].Snapshot.Pods[ep.Addr()].Name
}

func (r *replay) lookup(prefix []byte) *proxy.Rule {
	for _, v := range r.views {
		if rule := v.Program.Index().Lookup(prefix); rule != nil {
			return rule
		}
	}
	return nil
}

func (r *replay) run() error {
	for {
		it, err := r.cfg.Recording.Next()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case it.State != nil:
			if err := r.state(it.State); err != nil {
				return err
			}
		case it.Rules != nil:
			g, err := generation(it.Rules)
			if err != nil {
				return fmt.Errorf("node: reading the recorded rules: %w", err)
			}
			r.rules.Add(g)
			r.hasPaths = true
		case it.Affinity != nil:
			r.c.RestoreAffinity(recalled(it.Affinity), it.Affinity.Complete)
		case it.Names != nil:
			r.names = *it.Names
			r.drops = drop.NewDecoder(r.names.Reasons)
		case it.Frame != nil:
			r.frame(it.Frame)
		case it.Loss != nil:
			if ofPaths(it.Loss.Source) {
				r.joiner.Lost(*it.Loss)
			} else {
				r.c.Lost(*it.Loss)
			}
			if r.cfg.Loss != nil {
				r.cfg.Loss(*it.Loss)
			}
		case it.End != nil:
			r.stats.Dropped = it.End.Dropped
		}
	}
}

// recalled is what a recording tells of clients, as a correlator takes it.
func recalled(a *record.Affinity) []correlate.AffinityState {
	out := make([]correlate.AffinityState, len(a.Clients))
	for i, c := range a.Clients {
		out[i].AffinitySeed = correlate.AffinitySeed{Client: c.Addr, Service: c.Service, Endpoint: c.Endpoint, Last: time.Unix(0, c.Last)}
		out[i].Exact, out[i].Evicted = c.Exact, c.Evicted
	}
	return out
}

// state makes a generation of intent the newest one.
func (r *replay) state(s *record.State) error {
	var p proxy.Program
	if r.cfg.Program != nil {
		p = r.cfg.Program(s)
	}
	if p == nil {
		_, all, err := rulesets(s.Rules4, s.Rules6)
		if err != nil {
			return fmt.Errorf("node: reading the recorded rules: %w", err)
		}
		addrs := s.Snapshot.Node.Addrs
		p = liverules.New(liverules.Config{Addrs: addrs, Snapshot: s.Snapshot, Overlay: s.Overlay}, all...)
	}
	v := &proxy.View{Mode: s.Mode, Snapshot: s.Snapshot, Overlay: s.Overlay, Program: p, From: s.From, Done: s.From}
	r.views = append([]*proxy.View{v}, r.views[:min(len(r.views), 7)]...)
	r.stats.States++
	return nil
}

func (r *replay) frame(f *trace.Frame) {
	r.stats.Frames++
	at := time.Unix(0, f.Time)
	if r.stats.First.IsZero() {
		r.stats.First = at
	}
	r.stats.Last = at
	// What timers found out before this frame was read.
	if f.Time-r.advanced >= int64(tickEvery) && f.Time < math.MaxInt64 {
		r.advanced = f.Time
		r.c.Advance(at)
		r.joiner.Advance(at.Add(-pathSlack))
		r.deliver(at, false)
	}
	switch f.Source {
	case trace.Wire:
		r.sight(r.wire, *f)
		return
	case trace.Drops:
		r.drop(r.drops, *f)
		return
	}
	if t := r.tracers[f.Source]; t != nil {
		r.hit(t, *f)
		return
	}
	d := r.decoders[f.Source]
	if d == nil {
		r.stats.Skipped++
		return
	}
	r.events = d.Decode(*f, r.events[:0])
	r.stats.Events += uint64(len(r.events))
	for i := range r.events {
		r.c.Handle(&r.events[i])
	}
}

// ofPaths reports whether a source tells the paths of packets and no decisions.
func ofPaths(s trace.SourceID) bool {
	return s == trace.NFTrace || s == trace.LegacyTrace || s == trace.Wire || s == trace.Drops
}

// deliver gives paths to their flows; with last there is no later.
func (r *replay) deliver(now time.Time, last bool) {
	n := len(r.ready)
	left, strays := r.give(r.c, now, last)
	r.ready = left
	r.stats.Paths += uint64(n - len(left))
	r.stats.StrayPaths += strays
}

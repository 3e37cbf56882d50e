package node

import (
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
	"github.com/kptrace/kptrace/trace/path"
	"github.com/kptrace/kptrace/trace/record"
)

const (
	// tapFrames bounds the frames that wait for a recorder, and with what one
	// receive brings the memory.
	tapFrames = 256
	// stateEvery is how often a recorder looks for a new generation of intent.
	stateEvery = 100 * time.Millisecond
)

// taps are the recorders at work. Without any a frame costs one load.
type taps struct {
	mu   sync.Mutex // guards changes
	list atomic.Pointer[[]*tap]
}

// tap is one recorder.
type tap struct {
	frames  chan trace.Frame
	losses  chan trace.Loss
	dropped atomic.Uint64
}

func (t *taps) change(f func([]*tap) []*tap) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var old []*tap
	if p := t.list.Load(); p != nil {
		old = *p
	}
	list := f(slices.Clone(old))
	t.list.Store(&list)
}

// frame gives every recorder a copy. It never waits.
func (t *taps) frame(f trace.Frame) {
	p := t.list.Load()
	if p == nil {
		return
	}
	for _, x := range *p {
		if len(x.frames) == cap(x.frames) {
			x.dropped.Add(1)
			continue
		}
		c := f
		c.Data = slices.Clone(f.Data)
		select {
		case x.frames <- c:
		default:
			x.dropped.Add(1)
		}
	}
}

// loss tells every recorder what was missed.
func (t *taps) loss(l trace.Loss) {
	p := t.list.Load()
	if p == nil {
		return
	}
	for _, x := range *p {
		select {
		case x.losses <- l:
		default:
			x.dropped.Add(1)
		}
	}
}

// record writes what the sources read from now on until ctx ends.
func (n *node) record(ctx context.Context, to io.Writer) error {
	x := &tap{frames: make(chan trace.Frame, tapFrames), losses: make(chan trace.Loss, tapFrames)}
	n.tracer.taps.change(func(list []*tap) []*tap { return append(list, x) })
	defer n.tracer.taps.change(func(list []*tap) []*tap {
		return slices.DeleteFunc(list, func(o *tap) bool { return o == x })
	})
	w, err := record.NewWriter(to, record.Header{
		Version: n.cfg.Version, Node: n.cfg.Name, Mode: n.cfg.Backend.Mode(), Started: time.Now(),
		MasqueradeMark: n.cfg.MasqueradeMark, EntriesDecide: n.cfg.ReadOnly, Addrs: interfaceAddrs(),
	})
	if err == nil {
		err = n.recordAffinity(ctx, w)
	}
	if err != nil {
		return err
	}
	var told *proxy.View
	state := func() error {
		views := n.syncer.Views()
		if len(views) == 0 || views[0] == told || views[0].Program == nil {
			return nil
		}
		told = views[0]
		v4, v6 := rulesOf(told.Program)
		return w.State(record.State{Mode: told.Mode, From: told.From, Snapshot: told.Snapshot, Overlay: told.Overlay, Rules4: v4, Rules6: v6})
	}
	paths := recordedPaths{n: n, w: w}
	tick := time.NewTicker(stateEvery)
	defer tick.Stop()
	err = errors.Join(state(), paths.look())
	for err == nil {
		select {
		case f := <-x.frames:
			// What it means may be newer than what was written before it came.
			if err = errors.Join(state(), paths.look()); err == nil {
				err = w.Frame(f)
			}
		case l := <-x.losses:
			err = w.Loss(l)
		case <-tick.C:
			if err = errors.Join(state(), paths.look()); err == nil {
				err = w.Flush()
			}
		case <-ctx.Done():
			for err == nil && len(x.frames) > 0 {
				err = w.Frame(<-x.frames)
			}
			if err == nil {
				err = w.End(x.dropped.Load())
			}
			return err
		}
	}
	return err
}

// recordAffinity writes what the tracer knows of clients. Frames are kept already, so
// that nothing is missing between; what both tell, a replay tells apart by its time.
// Where the tracer does not answer, a replay knows nothing of them, and says so.
func (n *node) recordAffinity(ctx context.Context, w *record.Writer) error {
	var a record.Affinity
	err := n.tracer.do(ctx, func(c *correlate.Correlator) {
		clients, complete := c.Affinity()
		a.Complete = complete
		for _, s := range clients {
			a.Clients = append(a.Clients, record.Client{
				Addr: s.Client, Service: s.Service, Endpoint: s.Endpoint, Last: s.Last.UnixNano(), Exact: s.Exact, Evicted: s.Evicted,
			})
		}
	})
	if err != nil {
		n.cfg.Logger.Warn("a recording begins without what is known of session affinity", "err", err)
	}
	return w.Affinity(a)
}

// interfaceAddrs are the node's own, but for loopback's.
func interfaceAddrs() (all []netip.Addr) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil // connections of the node itself are then those of elsewhere
	}
	for _, a := range list {
		if p, err := netip.ParsePrefix(a.String()); err == nil && !p.Addr().IsLoopback() {
			all = append(all, p.Addr())
		}
	}
	return all
}

// namesEvery is how often a recorder looks for devices that are new.
const namesEvery = time.Second

// recordedPaths writes what traces of paths are to be understood by.
type recordedPaths struct {
	n     *node
	w     *record.Writer
	told  *path.Generation
	names record.Names
	next  time.Time
}

// look writes what is new, if paths are being traced.
func (r *recordedPaths) look() error {
	s := r.n.paths.live.Load()
	if s == nil {
		return nil
	}
	if g := s.rules.Newest(); g != nil && g != r.told {
		r.told = g
		if err := r.w.Rules(recordable(g)); err != nil {
			return err
		}
	}
	now, names := time.Now(), record.Names{Devices: map[uint32]string{}}
	if reasons := s.drops.reasons.Load(); reasons != nil {
		names.Reasons = *reasons
	}
	if now.Before(r.next) && (names.Reasons == nil) == (r.names.Reasons == nil) {
		return nil
	}
	r.next = now.Add(namesEvery)
	list, err := net.Interfaces()
	if err != nil {
		return nil // they stay numbers
	}
	for i := range list {
		names.Devices[uint32(list[i].Index)] = list[i].Name
	}
	if maps.Equal(names.Devices, r.names.Devices) && maps.Equal(names.Reasons, r.names.Reasons) {
		return nil
	}
	r.names = names
	return r.w.Names(names)
}

// rulesOf is a program as iptables-save prints it, by family; of a program that
// only adds to the rules of others, those too.
func rulesOf(p proxy.Program) (v4, v6 string) {
	if r, ok := p.(interface{ Rules() (v4, v6 string) }); ok {
		return r.Rules()
	}
	v4, v6, _ = strings.Cut(p.Text(), "# ip6tables-restore\n")
	return v4, v6
}

package node

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/selection"
	"github.com/kptrace/kptrace/trace/source/drop"
	"github.com/kptrace/kptrace/trace/source/wire"
)

// pathExtra runs a source beside the rules': paths are good without it. It is
// started anew where what it looks for changes.
type pathExtra struct {
	stop func()
	// fault is why it does not run, nil if it does.
	fault atomic.Pointer[error]
	live  atomic.Pointer[func() trace.SourceStats]
}

// run runs a source until stopped, in the calling thread's namespace.
func (x *pathExtra) run(ctx context.Context, src trace.Source, emit func(trace.Frame)) {
	x.end()
	ctx, cancel := context.WithCancel(ctx)
	ready, ended := make(chan struct{}), make(chan struct{})
	stats := src.Stats
	x.live.Store(&stats)
	x.fault.Store(nil)
	go func() {
		defer close(ended)
		err := guard(func() error { return src.Run(ctx, sync.OnceFunc(func() { close(ready) }), emit) })()
		if err != nil && ctx.Err() == nil {
			x.live.Store(nil)
			x.fault.Store(&err)
		}
	}()
	select {
	case <-ready:
	case <-ended:
	}
	x.stop = func() {
		cancel()
		<-ended
		x.live.Store(nil)
	}
}

// end stops the source, if one runs.
func (x *pathExtra) end() {
	if x.stop != nil {
		x.stop()
		x.stop = nil
	}
}

// wires looks at the devices for what is wanted.
type wires struct {
	pathExtra
	decoder *wire.Decoder
	ports   []uint16
	all     bool
}

// look makes the source look for w.
func (x *wires) look(ctx context.Context, w *selection.Want, emit func(trace.Frame), lose func(trace.Loss)) {
	var ports []uint16
	for _, list := range [][]selection.Entry{w.To, w.From} {
		for _, e := range list {
			ports = append(ports, e.Addr.Port())
		}
	}
	slices.Sort(ports)
	ports = slices.Compact(ports)
	all := w.Packets != 1
	if x.stop != nil && x.all == all && slices.Equal(x.ports, ports) {
		return
	}
	x.ports, x.all = ports, all
	if len(ports) == 0 {
		x.end() // there is nothing to look for, and no ports would mean all
		return
	}
	src := wire.New(wire.Config{Ports: ports, AllPackets: all, OnLoss: lose})
	x.decoder = src.Decoder()
	x.run(ctx, src, emit)
}

// drops asks for the kernel's reasons.
type drops struct {
	pathExtra
	decoder *drop.Decoder
	// reasons are the decoder's, for recorders; nil before the source runs.
	reasons atomic.Pointer[map[uint32]string]
}

// look starts the source, once.
func (x *drops) look(ctx context.Context, emit func(trace.Frame), lose func(trace.Loss)) {
	if x.decoder != nil {
		return
	}
	src := drop.New(drop.Config{OnLoss: lose})
	x.decoder = src.Decoder()
	reasons := x.decoder.Reasons()
	x.reasons.Store(&reasons)
	x.run(ctx, src, emit)
}

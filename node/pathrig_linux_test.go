package node

import (
	"context"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/proxytest"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/path"
	"github.com/kptrace/kptrace/trace/selection"
	"github.com/kptrace/kptrace/trace/source/legacytrace"
	"github.com/kptrace/kptrace/trace/source/nftrace"
	"github.com/kptrace/kptrace/trace/source/wire"
)

// pathRig traces all packets to Services in a node's namespace and joins what it
// sees, without a proxy and its flows.
type pathRig struct {
	t       *testing.T
	ns      *netns.NS
	flavour xtables.Flavour
	six     bool
	tools   xtables.Tools
	source  traceSource
	rules   path.Rules
	sel     *selection.Selection
	frames  frameQueue
	devices devices
	wire    *wire.Source

	mu     sync.Mutex // guards what follows
	joiner *path.Joiner
	joined []path.Joined
	lost   uint64
}

func newPathRig(t *testing.T, ns *netns.NS, fl xtables.Flavour, six bool) *pathRig {
	t.Helper()
	return newPathRigOf(t, ns, fl, six, 0)
}

// newPathRigOf is newPathRig with a receive buffer of a size.
func newPathRigOf(t *testing.T, ns *netns.NS, fl xtables.Flavour, six bool, buffer int) *pathRig {
	t.Helper()
	r := &pathRig{t: t, ns: ns, flavour: fl, six: six, tools: xtables.Tools{Netns: ns.Fd()}}
	r.frames.wake = make(chan struct{}, 1)
	lose := func(l trace.Loss) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.lost += l.Events
		r.joiner.Lost(l)
	}
	if fl == xtables.NFT {
		r.source = nftSource{nftrace.New(nftrace.Config{OnLoss: lose, ReceiveBuffer: buffer})}
	} else {
		r.source = legacySource{legacytrace.New(legacytrace.Config{OnLoss: lose, ReceiveBuffer: buffer})}
		for _, name := range []string{"net.netfilter.nf_log.2", "net.netfilter.nf_log.10"} {
			r.must(ns.SetSysctl(name, "nfnetlink_log"))
		}
	}
	r.joiner = path.New(path.Config{
		Rules: r.rules.Find, Hook: r.rules.Hook, IPVS: r.rules.IPVS, Own: selection.Owns, Device: r.device,
		Emit: func(j path.Joined) { r.joined = append(r.joined, j) },
	})
	r.sel = selection.New(selection.Config{Tools: r.tools, Flavour: fl, IPv6: six, Timeout: time.Minute})
	ctx, stop := context.WithCancel(context.Background())
	listening, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- ns.Do(func() error {
			return r.source.Run(ctx, sync.OnceFunc(func() { close(listening) }), r.frames.put)
		})
	}()
	select {
	case <-listening:
	case err := <-ended:
		t.Fatal(err)
	}
	joining := make(chan struct{})
	go func() {
		defer close(joining)
		for ctx.Err() == nil {
			time.Sleep(10 * time.Millisecond)
			r.join()
		}
	}()
	t.Cleanup(func() {
		stop()
		<-joining
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := ns.Do(func() error { return r.sel.Close(context.Background()) }); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *pathRig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *pathRig) join() {
	r.mu.Lock()
	defer r.mu.Unlock()
	var hits []trace.RuleHit
	for _, f := range r.frames.take() {
		if f.Source == trace.Wire {
			for _, s := range r.wire.Decoder().Decode(f, nil) {
				r.joiner.Sighting(&s, f.Time)
			}
			continue
		}
		hits = r.source.hits().DecodeHits(f, hits[:0])
		for i := range hits {
			r.joiner.Hit(&hits[i], f.Time)
		}
	}
	r.joiner.Advance(time.Now())
}

// device names an interface of the node.
func (r *pathRig) device(index uint32) (name string) {
	r.must(r.ns.Do(func() error { name = r.devices.name(index); return nil }))
	return name
}

// watchWire looks at the devices too.
func (r *pathRig) watchWire() {
	r.t.Helper()
	r.wire = wire.New(wire.Config{Ports: []uint16{80, 8080}})
	ctx, stop := context.WithCancel(context.Background())
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- r.ns.Do(func() error {
			return r.wire.Run(ctx, sync.OnceFunc(func() { close(ready) }), r.frames.put)
		})
	}()
	r.t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			r.t.Error(err)
		}
	})
	select {
	case <-ready:
	case err := <-ended:
		r.t.Fatal(err)
	}
}

// follow selects all Services of a snapshot and reads the rules that are live.
func (r *pathRig) follow(ctx context.Context, snap *proxy.Snapshot, packets int) {
	r.t.Helper()
	local := []netip.Addr{proxytest.NodeAddr, netip.MustParseAddr("127.0.0.1"), proxytest.In6(proxytest.NodeAddr)}
	w := selection.Of(snap, &trace.Filter{}, local)
	w.Packets = packets
	r.must(r.ns.Do(func() error { return r.sel.Set(ctx, w) }))
	r.reload(ctx)
}

func (r *pathRig) reload(ctx context.Context) {
	r.t.Helper()
	r.must(r.ns.Do(func() error {
		g, err := path.Load(ctx, path.LoadConfig{Tools: r.tools, Flavour: r.flavour, IPv6: r.six})
		if err == nil {
			r.rules.Add(g)
		}
		return err
	}))
}

// find waits for the path of the first packet from a client's port.
func (r *pathRig) find(port uint16, packet string) (path.Joined, bool) {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		r.mu.Lock()
		for _, j := range r.joined {
			if j.Path.Tuple.Src().Port() == port && j.Path.Packet == packet {
				r.mu.Unlock()
				return j, true
			}
		}
		r.mu.Unlock()
		if time.Now().After(end) {
			return path.Joined{}, false
		}
	}
}

// backendFor is the iptables mode of a Setup in a namespace.
func backendFor(s proxytest.Setup, ns *netns.NS, fl xtables.Flavour, six bool) *iptables.Backend {
	cfg := iptables.Config{
		Flavour: fl.String(), Tools: xtables.Tools{Netns: ns.Fd()}, Trace: true,
		MasqueradeAll: s.MasqueradeAll, LocalhostNodePorts: true,
	}
	if six {
		cfg.Family = xtables.IPv6
	}
	if s.ClusterCIDR.IsValid() {
		cfg.ClusterCIDRs = []netip.Prefix{s.ClusterCIDR}
	}
	return iptables.New(cfg)
}

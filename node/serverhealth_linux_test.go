package node

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/umlguest/guesttest"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/proxy/ipvs"
	"github.com/kptrace/kptrace/proxy/proxytest"
	"github.com/kptrace/kptrace/proxy/serverhealth"
)

// healthWorld is proxytest's world with a Service of four endpoints, one of which
// swallows everything.
type healthWorld struct {
	*proxytest.World
	t      *testing.T
	n      *node
	vip    netip.AddrPort
	dead   netip.AddrPort
	events []proxy.ObjectEvent
	mu     sync.Mutex // guards events
}

func newHealthWorld(t *testing.T, backend func(*proxytest.World) proxy.Backend) *healthWorld {
	w := &healthWorld{World: proxytest.NewWorld(t, false), t: t,
		vip: netip.MustParseAddrPort("10.96.0.10:80"), dead: netip.MustParseAddrPort("10.244.2.99:8080")}
	// The pod c gets what is for the dead endpoint and is no router.
	w.Must(w.Node.Do(func() error {
		return netlink.RouteAdd(&netlink.Route{Dst: &net.IPNet{IP: w.dead.Addr().AsSlice(), Mask: net.CIDRMask(32, 32)},
			Gw: proxytest.FromC.Addr().AsSlice()})
	}))
	b := backend(w.World)
	cfg := Config{Name: "node1", Backend: b, Logger: slog.New(slog.DiscardHandler), Events: func(e proxy.ObjectEvent) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.events = append(w.events, e)
	}}
	w.n = &node{cfg: cfg, teller: newTeller(&cfg), syncer: proxy.NewSyncer(proxy.SyncerConfig{Backend: b, MinInterval: 10 * time.Millisecond})}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.n.syncer.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	snap := proxytest.Services("t/web tcp 10.96.0.10:80 a:8080 b:8080 c:8080")
	ep := snap.Services[0].Endpoints[2]
	ep.Addr = w.dead
	snap.Services[0].Endpoints = append(snap.Services[0].Endpoints, ep)
	synced := w.n.syncer.Synced()
	w.n.syncer.Set(snap)
	<-synced
	if v := w.n.view(); v == nil || v.Err != nil {
		t.Fatalf("not programmed: %+v", v)
	}
	return w
}

// check starts to check endpoints.
func (w *healthWorld) check() *serverhealth.Checker {
	w.t.Helper()
	var table *conntrack.Conn
	w.Must(w.Node.Do(func() (err error) { table, err = conntrack.Open(conntrack.Config{}); return err }))
	c := serverhealth.NewChecker(serverhealth.Config{View: w.n.view, SetOverlay: w.n.setOverlay, Changed: w.n.endpointChanged, Table: table,
		Dial: func(ctx context.Context, addr netip.AddrPort) (conn net.Conn, err error) {
			ns := w.Node.Do(func() error {
				conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", addr.String())
				return nil
			})
			if ns != nil {
				return nil, ns
			}
			return conn, err
		}})
	w.n.servers.Store(c)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	w.t.Cleanup(func() { cancel(); <-done; table.Close() })
	return c
}

// failures makes n connections, some at a time, and counts those that fail.
func (w *healthWorld) failures(n, parallel int, timeout time.Duration) int {
	var wg sync.WaitGroup
	var mu sync.Mutex
	failed, turn := 0, make(chan struct{}, parallel)
	for range n {
		wg.Add(1)
		turn <- struct{}{}
		go func() {
			defer func() { <-turn; wg.Done() }()
			if r := w.From(proxytest.FromOutside, conntrack.TCP, w.vip, timeout); r.Err != nil {
				mu.Lock()
				failed++
				mu.Unlock()
			}
		}()
	}
	wg.Wait()
	return failed
}

// A dead endpoint costs its share of all connections. With checks it is out soon,
// clients that were stuck with it get through to another, and of 1,000 that come
// after that hardly any fails; it is said in an Event.
func (w *healthWorld) test() {
	t := w.t
	if n := w.failures(40, 8, 900*time.Millisecond); n < 5 {
		t.Errorf("without checks %d of 40 connections failed; a quarter of the endpoints is dead", n)
	}
	// Eight that come before the checks: some are with the dead one.
	stuck := make(chan int)
	go func() { stuck <- w.failures(8, 8, 20*time.Second) }()
	time.Sleep(300 * time.Millisecond) // their first SYN is on its way
	start := time.Now()
	c := w.check()
	for end := time.Now().Add(time.Minute); len(c.Out()) == 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never out: %+v", c.Stats())
		}
	}
	t.Logf("out after %v", time.Since(start).Round(10*time.Millisecond))
	if n := <-stuck; n != 0 {
		t.Errorf("%d of 8 clients that were there before did not get through", n)
	}
	// They are let go once the rules have changed, which may be after an endpoint is
	// said to be out; half-open ones of the clients before are there in any case.
	for end := time.Now().Add(time.Minute); c.Stats().Freed == 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no stuck connection was let go")
		}
	}
	if n := w.failures(1000, 16, 10*time.Second); n > 10 {
		t.Errorf("%d of 1000 connections failed", n)
	} else {
		t.Logf("%d of 1000 connections failed", n)
	}
	out := c.Out()
	if len(out) != 1 || out[w.dead].Reason == "" {
		t.Errorf("out: %v", out)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.events) == 0 || w.events[0].Reason != reasonEndpointOut || w.events[0].Object.String() != "Service t/web" ||
		!strings.Contains(w.events[0].Note, "endpoint 10.244.2.99:8080 ") || !strings.Contains(w.events[0].Note, "times in a row; it gets no new connections") {
		t.Errorf("events: %+v", w.events)
	}
}

func TestServerHealthIPVS(t *testing.T) {
	guesttest.Group(t, func(t *testing.T) {
		t.Run("dead endpoint", func(t *testing.T) {
			newHealthWorld(t, func(w *proxytest.World) proxy.Backend {
				for _, s := range ipvs.Sysctls(false, "") {
					w.Must(w.Node.SetSysctl(s.Name, s.Value))
				}
				cfg := ipvs.Config{Flavour: "legacy"}
				cfg.Tools.Netns = w.Node.Fd()
				b, err := ipvs.New(cfg)
				w.Must(err)
				return b
			}).test()
		})
	})
}

func TestServerHealthIPTables(t *testing.T) {
	t.Parallel()
	newHealthWorld(t, func(w *proxytest.World) proxy.Backend {
		cfg := iptables.Config{Flavour: "nft"}
		cfg.Tools.Netns = w.Node.Fd()
		return iptables.New(cfg)
	}).test()
}

package node

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/trace"
)

var (
	hostIP    = netip.MustParseAddr("10.0.0.1")
	clusterIP = netip.MustParseAddr("10.96.0.10")
)

// loopback gives the namespace an address for endpoints and a route for
// cluster IPs, both on lo: one namespace is client, node and endpoints.
func loopback(t *testing.T) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: hostIP.AsSlice(), Mask: net.CIDRMask(32, 32)}}
	if err := netlink.AddrReplace(lo, addr); err != nil {
		t.Fatal(err)
	}
	_, services, _ := net.ParseCIDR("10.96.0.0/16")
	if err := netlink.RouteReplace(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: services, Src: hostIP.AsSlice()}); err != nil {
		t.Fatal(err)
	}
}

// serve answers on a port of the host address with its own name.
func serve(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", hostIP.String()+":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	at := l.Addr().(*net.TCPAddr).AddrPort()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "%s", at)
			c.Close()
		}
	}()
	return at
}

// ask connects to the cluster IP and returns which endpoint answered.
func ask() (string, error) {
	c, err := net.DialTimeout("tcp", clusterIP.String()+":80", time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Second))
	b := make([]byte, 64)
	n, err := c.Read(b)
	return string(b[:n]), err
}

func snapshot(endpoints ...netip.AddrPort) *proxy.Snapshot {
	s := proxy.Service{
		Name: proxy.PortName{Namespace: "shop", Name: "foo", Port: "http", Proto: conntrack.TCP},
		Type: "ClusterIP", ClusterIP: clusterIP, Port: 80,
	}
	for _, ep := range endpoints {
		s.Endpoints = append(s.Endpoints, proxy.Endpoint{Addr: ep, Ready: true, Serving: true, Local: true, Node: "node1"})
	}
	return &proxy.Snapshot{Node: proxy.Node{Name: "node1", Addrs: []netip.Addr{hostIP}}, Services: []proxy.Service{s}}
}

// running is a node under test.
type running struct {
	t      *testing.T
	socket string
	states chan *proxy.Snapshot
	done   chan error
	stop   context.CancelFunc
}

func start(t *testing.T, cfg Config) *running {
	t.Helper()
	loopback(t)
	r := &running{
		t: t, socket: filepath.Join(t.TempDir(), "k.sock"),
		states: make(chan *proxy.Snapshot), done: make(chan error, 1),
	}
	cfg.Name, cfg.Socket, cfg.Trace = "node1", r.socket, true
	if cfg.Backend == nil {
		cfg.Backend = iptables.New(iptables.Config{Flavour: "nft", Trace: true})
	}
	cfg.Undo = func() bool { return true }
	cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	cfg.State = func(ctx context.Context, emit func(*proxy.Snapshot)) error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case s := <-r.states:
				emit(s)
			}
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.stop = cancel
	go func() { r.done <- Run(ctx, cfg) }()
	t.Cleanup(r.end)
	return r
}

func (r *running) end() {
	r.stop()
	if r.done == nil {
		return
	}
	if err := <-r.done; err != nil {
		r.t.Errorf("node: %v", err)
	}
	r.done = nil
}

// eventually waits for ok, at most d.
func eventually(t *testing.T, d time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(d); ; time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", d, what)
		}
	}
}

// churn swaps the only endpoint n times, and requires each time that new
// connections reach the new one soon.
func (r *running) churn(n int, a, b netip.AddrPort) {
	r.t.Helper()
	for i := range n {
		ep := []netip.AddrPort{a, b}[i%2]
		r.states <- snapshot(ep)
		eventually(r.t, 2*time.Second, fmt.Sprintf("connections reach %s", ep), func() bool {
			got, err := ask()
			return err == nil && got == ep.String()
		})
	}
}

func (r *running) status() relay.Status {
	r.t.Helper()
	c, err := relay.Dial(r.socket)
	if err != nil {
		r.t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	s, err := c.Status(ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	return *s
}

// TestTracerPanic lets the tracer panic at every batch of events while
// endpoints change: Services follow all the same, and the status tells.
func TestTracerPanic(t *testing.T) {
	var on atomic.Bool
	r := start(t, Config{inject: func() {
		if on.Load() {
			panic("injected")
		}
	}})
	defer r.end()
	a, b := serve(t), serve(t)
	r.churn(2, a, b)
	on.Store(true)
	r.churn(20, a, b)
	on.Store(false)
	eventually(t, 5*time.Second, "the status tells of the fault", func() bool {
		for _, s := range r.status().Blind {
			if strings.Contains(s, "injected") {
				return true
			}
		}
		return false
	})
	eventually(t, 40*time.Second, "flows are seen again", func() bool {
		before := r.status().Ring.Published
		_, _ = ask()
		time.Sleep(200 * time.Millisecond)
		return r.status().Ring.Published > before
	})
}

// TestTracerStall blocks the tracer for good, and a follower that does not
// read, while endpoints change and connections are made.
func TestTracerStall(t *testing.T) {
	release := make(chan struct{})
	var on atomic.Bool
	r := start(t, Config{inject: func() {
		if on.Load() {
			<-release
		}
	}})
	defer r.end()
	defer close(release)
	a, b := serve(t), serve(t)
	r.churn(2, a, b)

	client, err := relay.Dial(r.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	reading := make(chan struct{})
	go func() {
		first := true
		_ = client.Follow(ctx, trace.Request{}, func(trace.Message) error {
			if first {
				first = false
				close(reading)
				<-ctx.Done()
			}
			return nil
		})
	}()
	<-reading
	for range 500 {
		if _, err := ask(); err != nil {
			t.Fatalf("with a follower that does not read: %v", err)
		}
	}
	on.Store(true)
	r.churn(20, a, b)
	for range 500 {
		if _, err := ask(); err != nil {
			t.Fatalf("with a tracer that stands still: %v", err)
		}
	}
	if st := r.status(); st.SyncError != "" {
		t.Errorf("sync error: %s", st.SyncError)
	}
}

// TestUndo ends a node that was asked to leave nothing.
func TestUndo(t *testing.T) {
	was := sysctl(t, "net/ipv4/conf/all/route_localnet")
	r := start(t, Config{})
	a := serve(t)
	r.churn(1, a, a)
	if n := len(r.status().Sysctls); n == 0 {
		t.Error("the status names no sysctl that was changed")
	}
	r.end()
	if now := sysctl(t, "net/ipv4/conf/all/route_localnet"); now != was {
		t.Errorf("route_localnet is %s, was %s", now, was)
	}
	if got, err := ask(); err == nil {
		t.Errorf("the cluster IP still answers after the end: %s", got)
	}
}

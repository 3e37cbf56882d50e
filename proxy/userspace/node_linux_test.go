package userspace

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// patience bounds waits that end as soon as what they wait for is there.
const patience = 20 * time.Second

// place is a node alone: clients and endpoints are loopback addresses of its.
type place struct {
	t  *testing.T
	ns *netns.NS
	b  *Backend

	mu     sync.Mutex
	events []proxy.RelayEvent
}

func newPlace(t *testing.T, cfg Config) *place {
	t.Helper()
	ns := proxytest.NewNS(t)
	cfg.Tools.Netns = ns.Fd()
	return newPlaceIn(t, cfg, ns)
}

// newPlaceIn makes a place of a namespace.
func newPlaceIn(t *testing.T, cfg Config, ns *netns.NS) *place {
	t.Helper()
	p := &place{t: t, ns: ns}
	p.must(p.ns.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		dst := netip.MustParsePrefix("10.96.0.0/16")
		// Without Src a client that binds to no address gets 0.0.0.0: it
		// connects, and nothing that is sent to it ever arrives.
		return netlink.RouteReplace(&netlink.Route{LinkIndex: lo.Attrs().Index, Src: net.IPv4(127, 0, 0, 1),
			Dst: &net.IPNet{IP: dst.Addr().AsSlice(), Mask: net.CIDRMask(dst.Bits(), 32)}})
	}))
	cfg.Flavour, cfg.LocalhostNodePorts = "nft", true
	if cfg.Drain == 0 {
		cfg.Drain = -1
	}
	p.b = start(t, cfg)
	p.b.Notify(func(e *proxy.RelayEvent) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.events = append(p.events, *e)
	})
	return p
}

func (p *place) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// serviceOf makes a Service with endpoints.
func serviceOf(name string, udp bool, at string, eps ...netip.AddrPort) proxy.Service {
	proto := "tcp"
	if udp {
		proto = "udp"
	}
	svc := proxytest.Services("shop/" + name + " " + proto + " " + at).Services[0]
	for _, a := range eps {
		svc.Endpoints = append(svc.Endpoints, proxy.Endpoint{Addr: a, Ready: true, Serving: true})
	}
	return svc
}

// apply makes services all there is.
func (p *place) apply(services ...proxy.Service) error {
	_, err := p.b.Apply(p.t.Context(), p.b.Render(&proxy.Snapshot{Node: proxytest.Node(), Services: services}, proxy.Overlay{}))
	return err
}

// listen serves TCP at an address of the node, each connection by serve.
func (p *place) listen(at string, serve func(*net.TCPConn)) netip.AddrPort {
	p.t.Helper()
	var l net.Listener
	p.must(p.ns.Do(func() (err error) {
		l, err = net.Listen("tcp4", at)
		return err
	}))
	p.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			}()
		}
	}()
	return addrOf(l.Addr())
}

// named serves TCP by saying a name.
func (p *place) named(at, name string) netip.AddrPort {
	return p.listen(at, func(c *net.TCPConn) { fmt.Fprint(c, name) })
}

// hole is an address that never answers.
func (p *place) hole(at string) netip.AddrPort {
	p.t.Helper()
	a := netip.MustParseAddrPort(at)
	tools := xtables.Tools{Netns: p.ns.Fd()}
	rep, err := xtables.NewRunner(xtables.RunnerConfig{Tools: tools}).Apply(p.t.Context(), xtables.Plan{{Units: []xtables.Unit{{
		Table: "filter", Owner: "the test", Lines: []string{"-I INPUT -d " + a.Addr().String() + "/32 -j DROP"},
	}}}})
	if err == nil && len(rep.Failed) > 0 {
		err = &rep.Failed[0]
	}
	p.must(err)
	return a
}

// dial connects from an address of the node.
func (p *place) dial(from, network, to string) (c net.Conn, err error) {
	var local net.Addr = &net.TCPAddr{IP: net.ParseIP(from)}
	if network == "udp" {
		local = &net.UDPAddr{IP: net.ParseIP(from)}
	}
	d := net.Dialer{LocalAddr: local, Timeout: patience}
	err = p.ns.Do(func() error {
		c, err = d.Dial(network, to)
		return err
	})
	if err == nil {
		p.t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(patience))
	}
	return c, err
}

// ask connects and reads all that the endpoint says.
func (p *place) ask(from, to string) (string, error) {
	c, err := p.dial(from, "tcp", to)
	if err != nil {
		return "", err
	}
	defer c.Close()
	b, err := io.ReadAll(c)
	return string(b), err
}

// nobody checks that an address is not served: nothing leads away from here, so
// connections are refused or never answered.
func (p *place) nobody(at string) {
	p.t.Helper()
	err := p.ns.Do(func() error {
		c, err := net.DialTimeout("tcp", at, 300*time.Millisecond)
		if err == nil {
			c.Close()
		}
		return err
	})
	if !refused(err) {
		p.t.Errorf("%s is served: %v", at, err)
	}
}

// told returns the events of a kind.
func (p *place) told(kind proxy.RelayEventKind) (out []proxy.RelayEvent) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range p.events {
		if e.Kind == kind {
			out = append(out, e)
		}
	}
	return out
}

// until waits for something to hold.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// refused reports whether nobody served a dial.
func refused(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial"
}

// stop ends the place's Backend as its process would.
func (p *place) stop() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	p.must(p.b.Run(ctx))
}

package proxytest

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/proxy"
	"github.com/vishvananda/netlink"
)

// World is the world of the table in namespaces: a node, and every other source in
// a namespace of its own, joined to the node by veth and routed.
type World struct {
	t *testing.T
	// six says that it is the IPv6 twin.
	six bool
	// bridged says that the node's pods are on one bridge.
	bridged bool
	// Node is the node, and NS all of them.
	Node *netns.NS
	NS   map[Source]*netns.NS
}

// Addr is an address of the world in its family.
func (w *World) Addr(a netip.Addr) netip.Addr {
	if w.six {
		return In6(a)
	}
	return a
}

// NewWorld makes the world, or its IPv6 twin.
func NewWorld(t *testing.T, six bool) *World {
	t.Helper()
	return newWorld(&World{t: t, six: six})
}

// Bridge is the device on which the node's pods are in a bridged World.
const Bridge = "cni0"

// gatewayAddr is the node's on it.
var gatewayAddr = netip.MustParseAddr("10.244.1.1")

// NewBridgedWorld makes the world with the node's pods on a bridge instead of
// routed to one by one. call says whether the node's rules see what crosses it
// (net.bridge.bridge-nf-call-iptables).
func NewBridgedWorld(t *testing.T, call bool) *World {
	t.Helper()
	w := &World{t: t, bridged: true, Node: NewNS(t)}
	w.Must(w.Node.SetSysctl("net.bridge.bridge-nf-call-iptables", strconv.Itoa(b2i(call))))
	w.Must(w.Node.Do(func() error {
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: Bridge}}); err != nil {
			return err
		}
		return addressed(Bridge, netip.PrefixFrom(gatewayAddr, PodCIDR.Bits()))
	}))
	return newWorld(w)
}

// addressed gives a link its only address and brings it up.
func addressed(name string, addr netip.Prefix) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: ipNet(addr)}); err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

func newWorld(w *World) *World {
	t := w.t
	t.Helper()
	if w.Node == nil {
		w.Node = NewNS(t)
	}
	w.NS = map[Source]*netns.NS{}
	for name, value := range map[string]string{"net.ipv4.ip_forward": "1", "net.ipv4.conf.all.rp_filter": "0",
		"net.ipv4.conf.default.rp_filter": "0", "net.ipv4.conf.all.route_localnet": "1",
		"net.netfilter.nf_conntrack_acct": "1", "net.ipv4.icmp_ratelimit": "0",
		"net.ipv6.conf.all.forwarding": "1", "net.ipv6.icmp.ratelimit": "0"} {
		w.Must(w.Node.SetSysctl(name, value))
	}
	for i, s := range Sources() {
		if s == FromNode {
			w.NS[s] = w.Node
			continue
		}
		w.NS[s] = NewNS(t)
		w.join(s, fmt.Sprintf("kp%d", i))
	}
	w.void()
	for _, s := range []Source{FromA, FromB, FromC} {
		w.Serve(s)
	}
	return w
}

// voidAddr is the router to which everything goes that nobody translated.
var voidAddr = netip.MustParseAddr("192.0.2.254")

// void makes that router, which says that nothing can be reached.
func (w *World) void() {
	w.t.Helper()
	ns := NewNS(w.t)
	w.Must(ns.SetSysctl("net.ipv4.ip_forward", "1"))
	w.Must(ns.SetSysctl("net.ipv4.icmp_ratelimit", "0"))
	w.Must(ns.SetSysctl("net.ipv6.conf.all.forwarding", "1"))
	w.Must(ns.SetSysctl("net.ipv6.icmp.ratelimit", "0"))
	w.Must(w.Node.Do(func() error {
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "to-void"}, PeerName: "kpvoid",
			PeerNamespace: netlink.NsFd(ns.Fd())})
		if err != nil {
			return err
		}
		return configure("to-void", "", w.Addr(NodeAddr), w.Addr(voidAddr), true)
	}))
	w.Must(ns.Do(func() error {
		if err := configure("kpvoid", "eth0", w.Addr(voidAddr), w.Addr(NodeAddr), true); err != nil {
			return err
		}
		for _, p := range []string{"10.96.0.0/16", "198.51.100.0/24"} {
			dst := netip.MustParsePrefix(p)
			if w.six {
				dst = netip.PrefixFrom(In6(dst.Addr()), dst.Bits()+96)
			}
			if err := netlink.RouteAdd(&netlink.Route{Dst: ipNet(dst), Type: syscall.RTN_UNREACHABLE}); err != nil {
				return err
			}
		}
		return nil
	}))
}

// NewNS makes a namespace for the time of a test.
func NewNS(t *testing.T) *netns.NS {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	// Link-local addresses would wait a second to see whether they are taken.
	if err := ns.SetSysctl("net.ipv6.conf.default.accept_dad", "0"); err != nil {
		t.Fatal(err)
	}
	return ns
}

// Must ends the test on an error.
func (w *World) Must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func linkOf(s Source) string { return "to-" + string(s) }

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func hostNet(a netip.Addr) *net.IPNet { return ipNet(netip.PrefixFrom(a, a.BitLen())) }

// join connects a source to the node.
func (w *World) join(s Source, peer string) {
	w.t.Helper()
	ns := w.NS[s]
	if w.bridged && PodCIDR.Contains(s.Addr()) {
		w.plug(s, peer)
		return
	}
	w.Must(w.Node.Do(func() error {
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: linkOf(s)}, PeerName: peer,
			PeerNamespace: netlink.NsFd(ns.Fd())})
		if err != nil {
			return err
		}
		return configure(linkOf(s), "", w.Addr(NodeAddr), w.Addr(s.Addr()), false)
	}))
	w.Must(ns.Do(func() error { return configure(peer, "eth0", w.Addr(s.Addr()), w.Addr(NodeAddr), true) }))
}

// plug connects a pod to the bridge.
func (w *World) plug(s Source, peer string) {
	w.t.Helper()
	ns := w.NS[s]
	w.Must(w.Node.Do(func() error {
		bridge, err := netlink.LinkByName(Bridge)
		if err != nil {
			return err
		}
		err = netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: linkOf(s), MasterIndex: bridge.Attrs().Index},
			PeerName:  peer, PeerNamespace: netlink.NsFd(ns.Fd()),
		})
		if err != nil {
			return err
		}
		port, err := netlink.LinkByName(linkOf(s))
		if err != nil {
			return err
		}
		if err := netlink.LinkSetHairpin(port, true); err != nil {
			return err
		}
		return netlink.LinkSetUp(port)
	}))
	w.Must(ns.Do(func() error {
		link, err := netlink.LinkByName(peer)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetName(link, "eth0"); err != nil {
			return err
		}
		if err := addressed("eth0", netip.PrefixFrom(s.Addr(), PodCIDR.Bits())); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gatewayAddr.AsSlice()})
	}))
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// configure brings up a link with one address and a route to the other end,
// through which everything else goes as well if asked.
func configure(name, rename string, self, other netip.Addr, all bool) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if rename != "" {
		if err := netlink.LinkSetName(link, rename); err != nil {
			return err
		}
	}
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: hostNet(self), Flags: syscall.IFA_F_NODAD * b2i(self.Is6())}); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	index := link.Attrs().Index
	err = netlink.RouteAdd(&netlink.Route{LinkIndex: index, Dst: hostNet(other), Scope: netlink.SCOPE_LINK, Src: self.AsSlice()})
	if err != nil || !all {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: index, Gw: other.AsSlice(), Src: self.AsSlice()})
}

// Serve makes a pod answer with its name and the client it sees.
func (w *World) Serve(s Source) {
	w.t.Helper()
	w.Must(w.NS[s].Do(func() error {
		for _, port := range []int{8080, 8443} {
			l, err := net.ListenTCP("tcp", &net.TCPAddr{Port: port})
			if err != nil {
				return err
			}
			w.t.Cleanup(func() { l.Close() })
			go func() {
				for {
					c, err := l.AcceptTCP()
					if err != nil {
						return
					}
					fmt.Fprintf(c, "%s:%d %s\n", s, port, c.RemoteAddr())
					c.Close()
				}
			}()
		}
		u, err := net.ListenUDP("udp", &net.UDPAddr{Port: 5353})
		if err != nil {
			return err
		}
		w.t.Cleanup(func() { u.Close() })
		go func() {
			b := make([]byte, 64)
			for {
				_, from, err := u.ReadFromUDPAddrPort(b)
				if err != nil {
					return
				}
				_, _ = u.WriteToUDPAddrPort(fmt.Appendf(nil, "%s:5353 %s\n", s, netip.AddrPortFrom(from.Addr().Unmap(), from.Port())), from)
			}
		}()
		return nil
	}))
}

// Reply is what a client got.
type Reply struct {
	// Endpoint is who answered, Seen the client as it saw it.
	Endpoint netip.AddrPort
	Seen     netip.Addr
	Err      error
}

// Outcome is the Reply in one word.
func (r Reply) Outcome() string {
	var timeout net.Error
	switch {
	case r.Err == nil:
		return "answered"
	case errors.Is(r.Err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(r.Err, syscall.EHOSTUNREACH), errors.Is(r.Err, syscall.ENETUNREACH):
		return "unreachable"
	case errors.As(r.Err, &timeout) && timeout.Timeout():
		return "timeout"
	}
	return r.Err.Error()
}

// Dial makes one connection or exchange from the calling thread's namespace.
func Dial(proto conntrack.Proto, to netip.AddrPort, timeout time.Duration) Reply {
	d := net.Dialer{Timeout: timeout}
	c, err := d.Dial(proto.String(), to.String())
	if err != nil {
		return Reply{Err: err}
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return Reply{Err: err}
	}
	var b []byte
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
		b, err = io.ReadAll(c)
	} else {
		b = make([]byte, 64)
		var n int
		if _, err = c.Write([]byte("?")); err == nil {
			n, err = c.Read(b)
		}
		b = b[:n]
	}
	if err != nil {
		return Reply{Err: err}
	}
	who, seen, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
	name, port, _ := strings.Cut(who, ":")
	from, err := netip.ParseAddrPort(seen)
	if err != nil {
		return Reply{Err: fmt.Errorf("bad answer %q", b)}
	}
	return Reply{Endpoint: netip.MustParseAddrPort(Source(name).Addr().String() + ":" + port), Seen: from.Addr()}
}

// Send sends the first packet of a connection from a port of the calling
// thread's namespace, and does not care what becomes of it.
func Send(proto conntrack.Proto, port uint16, to netip.AddrPort, timeout time.Duration) {
	d := net.Dialer{Timeout: timeout, Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1) })
	}}
	if proto == conntrack.UDP {
		d.LocalAddr = &net.UDPAddr{Port: int(port)}
	} else {
		d.LocalAddr = &net.TCPAddr{Port: int(port)}
	}
	c, err := d.Dial(proto.String(), to.String())
	if err != nil {
		return
	}
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	} else {
		_, _ = c.Write([]byte("?"))
	}
	c.Close()
}

// From dials from a source.
func (w *World) From(s Source, proto conntrack.Proto, to netip.AddrPort, timeout time.Duration) Reply {
	var r Reply
	w.Must(w.NS[s].Do(func() error { r = Dial(proto, to, timeout); return nil }))
	if w.six && r.Err == nil {
		r.Endpoint = netip.AddrPortFrom(w.Addr(r.Endpoint.Addr()), r.Endpoint.Port())
	}
	return r
}

// Check sends a row's packets until every endpoint has answered.
func (w *World) Check(t *testing.T, row Row) {
	timeout := 2 * time.Second
	want := map[proxy.Verdict]string{proxy.Forward: "answered", proxy.Reject: "refused", proxy.Drop: "timeout"}[row.Want.Verdict]
	if row.Want.Verdict == proxy.Drop {
		timeout = 100 * time.Millisecond
	}
	if row.Want.Verdict == proxy.Pass {
		switch {
		case row.To.Addr() == w.Addr(NodeAddr), row.To.Addr().IsLoopback():
			want = "refused" // by the node itself
		case slices.Contains([]netip.Addr{w.Addr(FromA.Addr()), w.Addr(FromB.Addr()), w.Addr(FromC.Addr())}, row.To.Addr()):
			want = "answered" // by the pod itself
		case row.Proto == conntrack.UDP: // whose sockets do not hear of unreachable hosts
			want, timeout = "timeout", 100*time.Millisecond
		default:
			want = "unreachable"
		}
	}
	seen := map[netip.AddrPort]bool{}
	for range 100 {
		r := w.From(row.From, row.Proto, row.To, timeout)
		if r.Outcome() != want {
			t.Fatalf("%s (%v), want %s", r.Outcome(), r.Err, want)
		}
		if row.Want.Verdict != proxy.Forward {
			return
		}
		client := row.Client()
		if row.MasqueradeOf(r.Endpoint) != "" {
			client = w.Addr(NodeAddr)
		}
		if r.Seen != client {
			t.Fatalf("%s saw the client as %s, want %s", r.Endpoint, r.Seen, client)
		}
		seen[r.Endpoint] = true
		if len(seen) == len(row.Want.Endpoints) || row.Want.Affinity > 0 {
			break
		}
	}
	found := 0
	for _, ep := range row.Want.Endpoints {
		if seen[ep] {
			found++
		}
	}
	if found != len(seen) || found < len(row.Want.Endpoints) && row.Want.Affinity == 0 {
		t.Errorf("endpoints that answered: %v, want %v", seen, row.Want.Endpoints)
	}
}

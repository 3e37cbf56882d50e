package iptables

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/proxy/proxytest"
	"github.com/vishvananda/netlink"
)

// world is proxytest's world in namespaces: a node, and every other source in
// a namespace of its own, joined to the node by veth and routed.
type world struct {
	t *testing.T
	// six says that it is the IPv6 twin.
	six  bool
	node *netns.NS
	ns   map[proxytest.Source]*netns.NS
}

func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldOf(t, false)
}

// addr is an address of the world in its family.
func (w *world) addr(a netip.Addr) netip.Addr {
	if w.six {
		return proxytest.In6(a)
	}
	return a
}

func newWorldOf(t *testing.T, six bool) *world {
	t.Helper()
	w := &world{t: t, six: six, node: newNS(t), ns: map[proxytest.Source]*netns.NS{}}
	for name, value := range map[string]string{"net.ipv4.ip_forward": "1", "net.ipv4.conf.all.rp_filter": "0",
		"net.ipv4.conf.default.rp_filter": "0", "net.ipv4.conf.all.route_localnet": "1",
		"net.netfilter.nf_conntrack_acct": "1", "net.ipv4.icmp_ratelimit": "0",
		"net.ipv6.conf.all.forwarding": "1", "net.ipv6.icmp.ratelimit": "0"} {
		w.must(w.node.SetSysctl(name, value))
	}
	for i, s := range proxytest.Sources() {
		if s == proxytest.FromNode {
			w.ns[s] = w.node
			continue
		}
		w.ns[s] = newNS(t)
		w.join(s, fmt.Sprintf("kp%d", i))
	}
	w.void()
	for _, s := range []proxytest.Source{proxytest.FromA, proxytest.FromB, proxytest.FromC} {
		w.serve(s)
	}
	return w
}

// voidAddr is the router to which everything goes that nobody translated.
var voidAddr = netip.MustParseAddr("192.0.2.254")

// void makes that router, which says that nothing can be reached.
func (w *world) void() {
	w.t.Helper()
	ns := newNS(w.t)
	w.must(ns.SetSysctl("net.ipv4.ip_forward", "1"))
	w.must(ns.SetSysctl("net.ipv4.icmp_ratelimit", "0"))
	w.must(ns.SetSysctl("net.ipv6.conf.all.forwarding", "1"))
	w.must(ns.SetSysctl("net.ipv6.icmp.ratelimit", "0"))
	w.must(w.node.Do(func() error {
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "to-void"}, PeerName: "kpvoid",
			PeerNamespace: netlink.NsFd(ns.Fd())})
		if err != nil {
			return err
		}
		return configure("to-void", "", w.addr(proxytest.NodeAddr), w.addr(voidAddr), true)
	}))
	w.must(ns.Do(func() error {
		if err := configure("kpvoid", "eth0", w.addr(voidAddr), w.addr(proxytest.NodeAddr), true); err != nil {
			return err
		}
		for _, p := range []string{"10.96.0.0/16", "198.51.100.0/24"} {
			dst := netip.MustParsePrefix(p)
			if w.six {
				dst = netip.PrefixFrom(proxytest.In6(dst.Addr()), dst.Bits()+96)
			}
			if err := netlink.RouteAdd(&netlink.Route{Dst: ipNet(dst), Type: syscall.RTN_UNREACHABLE}); err != nil {
				return err
			}
		}
		return nil
	}))
}

func newNS(t *testing.T) *netns.NS {
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

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func linkOf(s proxytest.Source) string { return "to-" + string(s) }

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func hostNet(a netip.Addr) *net.IPNet { return ipNet(netip.PrefixFrom(a, a.BitLen())) }

// join connects a source to the node.
func (w *world) join(s proxytest.Source, peer string) {
	w.t.Helper()
	ns := w.ns[s]
	w.must(w.node.Do(func() error {
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: linkOf(s)}, PeerName: peer,
			PeerNamespace: netlink.NsFd(ns.Fd())})
		if err != nil {
			return err
		}
		return configure(linkOf(s), "", w.addr(proxytest.NodeAddr), w.addr(s.Addr()), false)
	}))
	w.must(ns.Do(func() error { return configure(peer, "eth0", w.addr(s.Addr()), w.addr(proxytest.NodeAddr), true) }))
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

// serve makes a pod answer with its name and the client it sees.
func (w *world) serve(s proxytest.Source) {
	w.t.Helper()
	w.must(w.ns[s].Do(func() error {
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
				u.WriteToUDPAddrPort(fmt.Appendf(nil, "%s:5353 %s\n", s, netip.AddrPortFrom(from.Addr().Unmap(), from.Port())), from)
			}
		}()
		return nil
	}))
}

// reply is what a client got.
type reply struct {
	endpoint netip.AddrPort
	// seen is the client as the endpoint saw it.
	seen netip.Addr
	err  error
}

// outcome is the reply in one word.
func (r reply) outcome() string {
	var timeout net.Error
	switch {
	case r.err == nil:
		return "answered"
	case errors.Is(r.err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(r.err, syscall.EHOSTUNREACH), errors.Is(r.err, syscall.ENETUNREACH):
		return "unreachable"
	case errors.As(r.err, &timeout) && timeout.Timeout():
		return "timeout"
	}
	return r.err.Error()
}

// dial makes one connection or exchange from the calling thread's namespace.
func dial(proto conntrack.Proto, to netip.AddrPort, timeout time.Duration) reply {
	d := net.Dialer{Timeout: timeout}
	c, err := d.Dial(proto.String(), to.String())
	if err != nil {
		return reply{err: err}
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(timeout))
	var b []byte
	if tcp, ok := c.(*net.TCPConn); ok {
		tcp.SetLinger(0)
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
		return reply{err: err}
	}
	who, seen, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
	name, port, _ := strings.Cut(who, ":")
	from, err := netip.ParseAddrPort(seen)
	if err != nil {
		return reply{err: fmt.Errorf("bad answer %q", b)}
	}
	return reply{endpoint: netip.MustParseAddrPort(proxytest.Source(name).Addr().String() + ":" + port), seen: from.Addr()}
}

// from dials from a source.
func (w *world) from(s proxytest.Source, proto conntrack.Proto, to netip.AddrPort, timeout time.Duration) reply {
	var r reply
	w.must(w.ns[s].Do(func() error { r = dial(proto, to, timeout); return nil }))
	if w.six && r.err == nil {
		r.endpoint = netip.AddrPortFrom(w.addr(r.endpoint.Addr()), r.endpoint.Port())
	}
	return r
}

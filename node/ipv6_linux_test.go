package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/trace"
)

// TestIPv6 sends real packets through the rules of ip6tables and follows them:
// what NFLOG and conntrack report over IPv6 becomes Flows as over IPv4.
func TestIPv6(t *testing.T) {
	host, cluster := netip.MustParseAddr("fd00:1::1"), netip.MustParseAddr("fd00:96::10")
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	err = netlink.AddrReplace(lo, &netlink.Addr{IPNet: &net.IPNet{IP: host.AsSlice(), Mask: net.CIDRMask(128, 128)}, Flags: 2 /* IFA_F_NODAD */})
	if err != nil {
		t.Fatal(err)
	}
	_, services, _ := net.ParseCIDR("fd00:96::/112")
	if err := netlink.RouteReplace(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: services, Src: host.AsSlice()}); err != nil {
		t.Fatal(err)
	}
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			r := start(t, Config{Backend: iptables.NewDual(iptables.Config{Flavour: flavour, Trace: true})})
			defer r.end()
			tcp, err := net.Listen("tcp", netip.AddrPortFrom(host, 0).String())
			if err != nil {
				t.Fatal(err)
			}
			defer tcp.Close()
			udp, err := net.ListenPacket("udp", netip.AddrPortFrom(host, 0).String())
			if err != nil {
				t.Fatal(err)
			}
			defer udp.Close()
			go answerTCP(tcp)
			go answerUDP(udp)
			service := func(name string, proto conntrack.Proto, port uint16, to net.Addr) proxy.Service {
				s := proxy.Service{
					Name: proxy.PortName{Namespace: "shop", Name: name, Port: "p", Proto: proto},
					Type: "ClusterIP", ClusterIP: cluster, Port: port,
				}
				if to != nil {
					s.Endpoints = []proxy.Endpoint{{Addr: netip.MustParseAddrPort(to.String()), Ready: true, Serving: true, Local: true, Node: "node1", Namespace: "shop", Pod: name + "-1"}}
				}
				return s
			}
			flows := r.flows()
			r.states <- &proxy.Snapshot{Node: proxy.Node{Name: "node1", Addrs: []netip.Addr{host}}, Services: []proxy.Service{
				service("web", conntrack.TCP, 80, tcp.Addr()), service("dns", conntrack.UDP, 53, udp.LocalAddr()), service("none", conntrack.TCP, 81, nil),
			}}
			at := func(port uint16) string { return netip.AddrPortFrom(cluster, port).String() }
			eventually(t, 10*time.Second, "an answer over IPv6", func() bool { return dial("tcp", at(80)) == nil })
			if err := dial("udp", at(53)); err != nil {
				t.Errorf("UDP: %v", err)
			}
			if err := dial("tcp", at(81)); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("a Service without endpoints: %v, want ECONNREFUSED", err)
			}
			web := flows.await(t, "web", func(f *trace.Flow) bool { return f.Outcome == trace.Closed && f.Counted })
			if web.Tuple.Dst().Addr() != cluster || web.Client.Addr.Addr() != host || web.Backend.Addr.String() != tcp.Addr().String() ||
				web.Decision.Candidates != 1 || web.Established < 0 || web.Duration < web.Established || len(web.Attempts) != 1 || web.Out.Packets < 4 {
				t.Errorf("TCP: %+v", web)
			}
			for _, source := range []trace.SourceID{trace.NFLog, trace.Conntrack} {
				if !web.Evidence.Has(source) {
					t.Errorf("TCP: evidence %v lacks %v", web.Evidence.Names(), source)
				}
			}
			dns := flows.await(t, "dns", func(f *trace.Flow) bool { return f.Established >= 0 })
			if dns.Backend.Addr.String() != udp.LocalAddr().String() {
				t.Errorf("UDP: %+v", dns)
			}
			none := flows.await(t, "none", func(f *trace.Flow) bool { return f.Outcome == trace.Rejected })
			if none.Backend.Addr.IsValid() {
				t.Errorf("rejected: %+v", none)
			}
		})
	}
}

func answerTCP(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		fmt.Fprint(c, "here")
		c.Close()
	}
}

func answerUDP(c net.PacketConn) {
	b := make([]byte, 64)
	for {
		_, from, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		_, _ = c.WriteTo([]byte("here"), from)
	}
}

// dial asks for an answer.
func dial(network, addr string) error {
	c, err := net.DialTimeout(network, addr, 2*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	if network == "udp" {
		if _, err := c.Write([]byte("?")); err != nil {
			return err
		}
	}
	b := make([]byte, 16)
	n, err := c.Read(b)
	if err == nil && string(b[:n]) != "here" {
		err = fmt.Errorf("it says %q", b[:n])
	}
	return err
}

// followed are the newest revisions of Flows, by Service.
type followed struct{ ch chan *trace.Flow }

// flows follows the node until the test ends.
func (r *running) flows() *followed {
	r.t.Helper()
	f := &followed{ch: make(chan *trace.Flow, 1000)}
	var client *relay.Client
	eventually(r.t, 10*time.Second, "the node answers", func() bool {
		var err error
		if client, err = relay.Dial(r.socket); err != nil {
			return false
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_, err = client.Status(ctx)
		return err == nil
	})
	ctx, cancel := context.WithCancel(context.Background())
	done, begun := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		_ = client.Follow(ctx, trace.Request{}, func(m trace.Message) error {
			if m.Header != nil {
				close(begun)
			}
			if m.Flow != nil {
				select {
				case f.ch <- m.Flow:
				default:
				}
			}
			return nil
		})
	}()
	<-begun
	r.t.Cleanup(func() {
		cancel()
		<-done
		client.Close()
	})
	return f
}

// await waits for a Flow to a Service of which ok holds. Flows to other Services
// are kept for later.
func (f *followed) await(t *testing.T, service string, ok func(*trace.Flow) bool) *trace.Flow {
	t.Helper()
	var last *trace.Flow
	var others []*trace.Flow
	defer func() {
		for _, o := range others {
			f.ch <- o
		}
	}()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case flow := <-f.ch:
			if flow.Service.Name.Name != service {
				others = append(others, flow)
				continue
			}
			if last = flow; ok(flow) {
				return flow
			}
		case <-deadline:
			t.Fatalf("no such Flow to %s; the last one: %+v", service, last)
		}
	}
}

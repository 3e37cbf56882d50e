package ipvs

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	mobyipvs "github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/umlguest/guesttest"
	"github.com/kptrace/kptrace/trace"
)

// What is read of a real IPVS is what moby/ipvs says, and what connections did.
func TestKernel(t *testing.T) {
	guesttest.Group(t, func(t *testing.T) {
		w := newWorld(t)
		src := New(Config{})
		var mu sync.Mutex
		var events []trace.Event
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- src.Run(ctx, func() {}, func(f trace.Frame) {
				mu.Lock()
				defer mu.Unlock()
				events = src.Decoder().Decode(f, events)
			})
		}()
		defer func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}()
		find := func(ok func(e *trace.Event) bool) (found trace.Event) {
			t.Helper()
			eventually(t, src, func() bool {
				mu.Lock()
				defer mu.Unlock()
				i := slices.IndexFunc(events, func(e trace.Event) bool { return ok(&e) })
				if i >= 0 {
					found = events[i]
				}
				return i >= 0
			})
			return found
		}

		for range 19 {
			w.dial(t).Close()
		}
		held := w.dial(t)
		defer held.Close()
		client := held.LocalAddr().(*net.TCPAddr).AddrPort()

		t.Run("connection", func(t *testing.T) {
			e := find(func(e *trace.Event) bool { return e.Kind == trace.KindState && e.Tuple.Src() == client })
			if e.Tuple.Dst() != w.vip || e.Reply.Src() != w.pods[0] || e.IPVS.State.String() != "ESTABLISHED" || e.IPVS.Left == 0 {
				t.Errorf("%v, answered by %v, %v for %d s", e.Tuple, e.Reply, e.IPVS.State, e.IPVS.Left)
			}
		})
		t.Run("template", func(t *testing.T) {
			e := find(func(e *trace.Event) bool { return e.Kind == trace.KindTemplate })
			if e.Tuple.Src().Addr() != client.Addr() || e.Tuple.Dst() != w.vip || e.Reply.Src() != w.pods[0] || e.IPVS.Left == 0 || e.IPVS.Left > 60 {
				t.Errorf("%v to %v for %d s", e.Tuple, e.Reply.Src(), e.IPVS.Left)
			}
		})
		t.Run("server", func(t *testing.T) {
			e := find(func(e *trace.Event) bool { return e.Kind == trace.KindServer && e.IPVS.Active == 1 })
			want := trace.IPVSSample{Active: 1, Inactive: e.IPVS.Inactive, Weight: 1, Method: trace.ForwardNAT}
			if e.Tuple.Src() != w.pods[0] || e.Tuple.Dst() != w.vip || e.IPVS != want {
				t.Errorf("%v: %+v, want %+v", e.Tuple, e.IPVS, want)
			}
			tunnel := find(func(e *trace.Event) bool { return e.Kind == trace.KindServer && e.Tuple.Src() == w.pods[1] })
			if tunnel.IPVS.Method != trace.ForwardDirect || tunnel.IPVS.Weight != 0 {
				t.Errorf("%+v, want direct routing and weight 0", tunnel.IPVS)
			}
		})
		t.Run("statistics", func(t *testing.T) {
			var v trace.VirtualServer
			eventually(t, src, func() bool {
				all := src.Servers()
				if len(all) == 1 {
					v = all[0]
				}
				return v.Total.Connections == 20
			})
			if v.Addr != w.vip || v.Scheduler != "rr" || v.Persistence != time.Minute || len(v.Servers) != 2 {
				t.Fatalf("%+v", v)
			}
			r := v.Servers[0]
			if r.Addr != w.pods[0] || r.Weight != 1 || r.Active != 1 || r.Persistent != 1 || r.Forwarding != trace.ForwardNAT ||
				r.Total.Connections != 20 || r.Total.PacketsIn < 60 || r.Total.BytesOut == 0 {
				t.Errorf("%+v", r)
			}
			if r := v.Servers[1]; r.Forwarding != trace.ForwardDirect || r.Total.Connections != 0 {
				t.Errorf("%+v", r)
			}
		})
	})
}

func eventually(t *testing.T, src *Source, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it did not come; the source says %+v", src.Stats())
		}
	}
}

// world is a client, and a virtual server with a pod in a namespace of its own
// and another that is not there.
type world struct {
	vip  netip.AddrPort
	pods []netip.AddrPort
	ns   *netns.NS
}

func newWorld(t *testing.T) *world {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	w := &world{vip: ap("10.96.0.10:80"), pods: []netip.AddrPort{ap("10.1.0.2:8080"), ap("10.1.0.3:8080")}}
	client, err := netns.New()
	must(err)
	t.Cleanup(func() { client.Close() })
	w.ns = client
	pod, err := netns.New()
	must(err)
	t.Cleanup(func() { pod.Close() })

	link := func(ns *netns.NS, dev, ours, theirs string) {
		t.Helper()
		must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: dev}, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns.Fd())}))
		up(t, dev, ours)
		must(ns.Do(func() error {
			up(t, "eth0", theirs)
			gw, _, err := net.ParseCIDR(ours)
			if err != nil {
				return err
			}
			return netlink.RouteAdd(&netlink.Route{Gw: gw})
		}))
	}
	link(client, "client", "10.9.0.1/24", "10.9.0.2/24")
	link(pod, "pod", "10.1.0.1/24", "10.1.0.2/24")
	must(netlink.LinkAdd(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "kube-ipvs0"}}))
	up(t, "kube-ipvs0", "10.96.0.10/32")
	here, err := netns.Current()
	must(err)
	defer here.Close()
	must(here.SetSysctl("net.ipv4.ip_forward", "1"))

	h, err := mobyipvs.New("")
	must(err)
	defer h.Close()
	svc := &mobyipvs.Service{Address: w.vip.Addr().AsSlice(), Port: w.vip.Port(), Protocol: unix.IPPROTO_TCP, SchedName: "rr",
		AddressFamily: unix.AF_INET, Flags: flagPersistent, Timeout: 60, Netmask: 0xffffffff}
	must(h.NewService(svc))
	for i, p := range w.pods {
		must(h.NewDestination(svc, &mobyipvs.Destination{Address: p.Addr().AsSlice(), Port: p.Port(), Weight: 1 - i,
			AddressFamily: unix.AF_INET, ConnectionFlags: uint32(3 * i)}))
	}
	must(pod.Do(func() error {
		l, err := net.Listen("tcp", w.pods[0].String())
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { fmt.Fprintln(c, "hello"); io.Copy(io.Discard, c); c.Close() }()
			}
		}()
		return nil
	}))
	return w
}

func up(t *testing.T, dev, addr string) {
	t.Helper()
	link, err := netlink.LinkByName(dev)
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err == nil {
		a, perr := netlink.ParseAddr(addr)
		if err = perr; err == nil {
			err = netlink.AddrAdd(link, a)
		}
	}
	if err != nil {
		t.Fatal(dev, err)
	}
}

// dial connects to the virtual server and reads its greeting.
func (w *world) dial(t *testing.T) net.Conn {
	t.Helper()
	var c net.Conn
	err := w.ns.Do(func() (err error) {
		c, err = (&net.Dialer{Timeout: 20 * time.Second}).Dial("tcp", w.vip.String())
		return err
	})
	if err == nil {
		_, err = io.ReadFull(c, make([]byte, 6))
	}
	if err != nil {
		t.Fatal(err)
	}
	return c
}

package ipvs

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	mobyipvs "github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// refusedApply applies what the kernel takes in part only.
func refusedApply(t *testing.T, b *Backend, s *proxy.Snapshot, want ...string) proxy.Report {
	t.Helper()
	rep, err := b.Apply(t.Context(), b.Render(s, proxy.Overlay{}))
	if err == nil {
		t.Fatal("all was taken")
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the error does not say %q:\n%v", w, err)
		}
	}
	return rep
}

// A scheduler that the kernel lacks is said before anything is written, or costs
// the one Service that names it.
func TestNoSuchScheduler(t *testing.T) {
	w := newWorld(t, false)
	_, _, err := inWorld(t, w, Config{Scheduler: "nosuch"}).Preflight(t.Context())
	if err == nil || !strings.Contains(err.Error(), "the kernel has no IPVS scheduler nosuch: load the module ip_vs_nosuch, or choose another by --ipvs-scheduler") {
		t.Errorf("preflight: %v", err)
	}
	if got := servers(t, w); len(got) != 0 {
		t.Errorf("preflight left %v", got)
	}
	b := inWorld(t, w, Config{})
	if variant, why, err := b.Preflight(t.Context()); err != nil || variant != "rr" || !strings.Contains(why, "iptables-legacy") {
		t.Errorf("%q, %q, %v", variant, why, err)
	}
	snap := proxytest.Services(`
		t/bad   tcp 10.96.0.10:80 a:8080
		t/good  tcp 10.96.0.11:80 a:8080
		t/other tcp 10.96.0.12:80 b:8080`)
	snap.Services[0].Scheduler = "nosuch"
	for range 2 { // again and again
		rep := refusedApply(t, b, snap, "Service t/bad tcp is not programmed: adding virtual server 10.96.0.10:80/tcp: the kernel has no scheduler nosuch")
		if !rep.Partial || rep.Refused != 1 || len(rep.Refusals) != 1 || rep.Refusals[0].Object != "Service t/bad" {
			t.Errorf("%+v", rep)
		}
		if got := servers(t, w); len(got) != 2 || got["10.96.0.11:80/tcp"] != "rr a" || got["10.96.0.12:80/tcp"] != "rr b" {
			t.Errorf("got %v", got)
		}
	}
	// Endpoints of others go all the same, and those that leave are let go.
	moved := proxytest.Services(`
		t/bad   tcp 10.96.0.10:80 a:8080
		t/good  tcp 10.96.0.11:80 b:8080
		t/other tcp 10.96.0.12:80 b:8080`)
	moved.Services[0].Scheduler = "nosuch"
	refusedApply(t, b, moved)
	w.Must(b.Drain())
	if got := servers(t, w)["10.96.0.11:80/tcp"]; got != "rr b" {
		t.Errorf("while another Service is refused: %q", got)
	}
	snap.Services[0].Scheduler = "wlc"
	mustApply(t, b, snap, proxy.Overlay{})
	if got := servers(t, w)["10.96.0.10:80/tcp"]; got != "wlc a" {
		t.Errorf("mended: %q", got)
	}
	// A scheduler can change under connections.
	snap.Services[0].Scheduler = "sh,port"
	mustApply(t, b, snap, proxy.Overlay{})
	if got := servers(t, w)["10.96.0.10:80/tcp"]; got != "sh a" {
		t.Errorf("changed: %q", got)
	}
}

// A set that is full costs those that do not fit in, and nobody else.
func TestSetIsFull(t *testing.T) {
	w := newWorld(t, false)
	b := inWorld(t, w, Config{MaxElements: 64})
	text := ""
	for i := range 200 {
		text += fmt.Sprintf("t/s%03d tcp 10.96.3.%d:80 a:8080\n", i, i+1)
	}
	rep := refusedApply(t, b, proxytest.Services(text), "the set is full: it was made for 64 members", "to the set KUBE-IPVS-IPS", "and 126 more Services")
	got := servers(t, w)
	if len(got) == 0 || len(got) != 200-rep.Refused {
		t.Errorf("%d of 200 programmed, %d refused", len(got), rep.Refused)
	}
	for k := range got {
		addr := netip.MustParseAddrPort(strings.TrimSuffix(k, "/tcp"))
		if r := w.From(proxytest.FromPod, conntrack.TCP, addr, 5*time.Second); r.Err != nil {
			t.Errorf("%s: %v", addr, r.Err)
		}
		break
	}
	// Fewer fit in again, once what goes has made room.
	fewer := b.Render(proxytest.Services("t/one tcp 10.96.3.1:80 a:8080\nt/two tcp 10.96.3.200:80 a:8080"), proxy.Overlay{})
	_, _ = b.Apply(t.Context(), fewer)
	if _, err := b.Apply(t.Context(), fewer); err != nil {
		t.Error(err)
	}
}

// What others take away behind our back is an error that names the Service, and
// the next sync finds out and repairs.
func TestBehindOurBack(t *testing.T) {
	w := newWorld(t, false)
	b := inWorld(t, w, Config{})
	two := "t/one tcp 10.96.0.10:80 a:8080%s\nt/two tcp 10.96.0.11:80 a:8080 b:8080"
	mustApply(t, b, proxytest.Services(fmt.Sprintf(two, "")), proxy.Overlay{})
	take := func() {
		inKernel(t, w, func(h *mobyipvs.Handle) {
			w.Must(h.DelService(key{netip.MustParseAddrPort("10.96.0.10:80"), conntrack.TCP}.service()))
		})
	}
	take()
	snap := proxytest.Services(fmt.Sprintf(two, " b:8080"))
	refusedApply(t, b, snap, "Service t/one tcp is not programmed: adding 10.244.1.3:8080 to virtual server 10.96.0.10:80/tcp")
	mustApply(t, b, snap, proxy.Overlay{})
	if got := servers(t, w); got["10.96.0.10:80/tcp"] != "rr a b" || got["10.96.0.11:80/tcp"] != "rr a b" {
		t.Errorf("got %v", got)
	}

	// Watch sees such things, and an address that is gone.
	ctx, cancel := context.WithCancel(t.Context())
	seen, done := make(chan proxy.Drift, 8), make(chan error, 1)
	go func() { done <- b.Watch(ctx, func(d proxy.Drift) { seen <- d }) }()
	defer func() { cancel(); w.Must(<-done) }()
	expect := func(what string) {
		t.Helper()
		select {
		case d := <-seen:
			if !d.Certain || !strings.Contains(d.What, what) {
				t.Errorf("saw %+v, want %s", d, what)
			}
			b.Forget()
			mustApply(t, b, snap, proxy.Overlay{})
		case <-time.After(time.Minute):
			t.Errorf("never saw that %s", what)
		}
	}
	take()
	expect("virtual server 10.96.0.10:80/tcp is gone")
	w.Must(w.Node.Do(func() error {
		link, err := netlink.LinkByName(Device)
		if err != nil {
			return err
		}
		return netlink.AddrDel(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 96, 0, 11), Mask: net.CIDRMask(32, 32)}})
	}))
	expect("10.96.0.11 is gone from kube-ipvs0")
	if r := w.From(proxytest.FromPod, conntrack.TCP, netip.MustParseAddrPort("10.96.0.11:80"), 5*time.Second); r.Err != nil {
		t.Errorf("repaired: %v", r.Err)
	}

	// So it sees real servers and members of sets that are gone or too many.
	b.Forget()
	mustApply(t, b, snap, proxy.Overlay{})
	sees := func(what string) {
		t.Helper()
		w.Must(b.withKernel(func(k *kernel) error {
			got, err := b.missing(k, b.applied)
			if got != what {
				t.Errorf("saw %q, want %q", got, what)
			}
			return err
		}))
		b.Forget()
		mustApply(t, b, snap, proxy.Overlay{})
	}
	sees("")
	inKernel(t, w, func(h *mobyipvs.Handle) {
		w.Must(h.DelDestination(key{netip.MustParseAddrPort("10.96.0.11:80"), conntrack.TCP}.service(),
			&mobyipvs.Destination{Address: net.IPv4(10, 244, 1, 2).To4(), Port: 8080, AddressFamily: afInet}))
	})
	sees("virtual server 10.96.0.11:80/tcp has 1 real servers of weight 1 in all, not 2 of 2")
	for _, c := range []struct{ args, what string }{
		{"del KUBE-CLUSTER-IP 10.96.0.11,tcp:80", "the set KUBE-CLUSTER-IP has 1 members, not 2"},
		{"add KUBE-LOOP-BACK 10.244.1.2,tcp:8080,10.244.1.9", "the set KUBE-LOOP-BACK has 3 members, not 2"},
		{"add KUBE-NODE-PORT-TCP 30999", "the set KUBE-NODE-PORT-TCP has 1 members, not 0"},
		{"flush KUBE-6-CLUSTER-IP", ""}, // nothing was in it
		{"flush KUBE-IPVS-IPS", "the set KUBE-IPVS-IPS has 0 members, not 2"},
		{"destroy KPTRACE-REAL", "the set KPTRACE-REAL is gone"}, // no rule uses it where nobody traces
	} {
		_, err := exec.Run(t.Context(), exec.Spec{Path: "ipset", Args: strings.Fields(c.args), Netns: w.Node.Fd()})
		w.Must(err)
		sees(c.what)
	}
	sees("")
}

// A device or a set of our name that is something else is left alone.
func TestNamesTaken(t *testing.T) {
	w := newWorld(t, false)
	snap := proxytest.Services("t/one tcp 10.96.0.10:80 a:8080")
	w.Must(w.Node.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: Device}, PeerName: "other"})
	}))
	refusedApply(t, inWorld(t, w, Config{}), snap, "the device kube-ipvs0 is a veth and not ours: rename it")
	w.Must(w.Node.Do(func() error {
		link, err := netlink.LinkByName(Device)
		if err != nil {
			return err
		}
		if err := netlink.LinkDel(link); err != nil {
			return err
		}
		if err := netlink.IpsetDestroy(setNoLocal.name(false)); err != nil {
			return err
		}
		return netlink.IpsetCreate(setNoLocal.name(false), typeIP, netlink.IpsetCreateOptions{})
	}))
	refusedApply(t, inWorld(t, w, Config{}), snap, "the set KPTRACE-NO-LOCAL is of type hash:ip and not ours")
}

// SCTP is balanced as TCP is.
func TestSCTP(t *testing.T) {
	w := newWorld(t, false)
	b := inWorld(t, w, Config{Trace: true})
	mustApply(t, b, proxytest.Services("t/sctp sctp 10.96.0.10:38412 nodeport=30412 a:38412 b:38412"), proxy.Overlay{})
	socket := func() (int, error) {
		return unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	}
	for _, pod := range []proxytest.Source{proxytest.FromA, proxytest.FromB} {
		w.Must(w.NS[pod].Do(func() error {
			fd, err := socket()
			if err != nil {
				return err
			}
			if err := unix.Bind(fd, &unix.SockaddrInet4{Port: 38412}); err != nil {
				return err
			}
			go func() {
				for {
					c, _, err := unix.Accept(fd)
					if err != nil {
						return
					}
					_, _ = unix.Write(c, []byte(pod))
					unix.Close(c)
				}
			}()
			t.Cleanup(func() { unix.Shutdown(fd, unix.SHUT_RDWR); unix.Close(fd) })
			return unix.Listen(fd, 8)
		}))
	}
	for _, to := range []string{"10.96.0.10:38412", "192.0.2.1:30412"} {
		addr, seen := netip.MustParseAddrPort(to), ""
		for range 4 {
			w.Must(w.NS[proxytest.FromOutside].Do(func() error {
				fd, err := socket()
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}); err != nil {
					return err
				}
				b := make([]byte, 8)
				n, err := unix.Read(fd, b)
				seen += string(b[:max(n, 0)])
				return err
			}))
		}
		if seen != "abab" && seen != "baba" {
			t.Errorf("%s by rr: %s", to, seen)
		}
	}
	if r := servers(t, w); r["10.96.0.10:38412/sctp"] != "rr a b" {
		t.Errorf("got %v", r)
	}
}

package ipvs

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	mobyipvs "github.com/moby/ipvs"
	"github.com/vishvananda/netlink"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// inKernel runs f with a handle in the world's node.
func inKernel(t *testing.T, w *proxytest.World, f func(*mobyipvs.Handle)) {
	t.Helper()
	w.Must(w.Node.Do(func() error {
		h, err := openIPVS()
		if err != nil {
			return err
		}
		defer h.Close()
		f(h)
		return nil
	}))
}

// servers lists the node's virtual servers as "10.96.0.10:80/tcp rr a b:2", real
// servers by the world's names with weights other than 1.
func servers(t *testing.T, w *proxytest.World) map[string]string {
	t.Helper()
	out := map[string]string{}
	inKernel(t, w, func(h *mobyipvs.Handle) {
		services, err := h.GetServices()
		w.Must(err)
		for _, s := range services {
			line := s.SchedName
			list, err := h.GetDestinations(s)
			w.Must(err)
			names := []string{}
			for _, d := range list {
				addr := netip.AddrPortFrom(addrOf(d.Address), d.Port)
				for _, src := range proxytest.Sources() {
					if src.Addr() == addr.Addr() {
						name := string(src)
						if d.Weight != 1 {
							name += fmt.Sprintf(":%d", d.Weight)
						}
						names = append(names, name)
					}
				}
			}
			sortStrings(names)
			out[key{netip.AddrPortFrom(addrOf(s.Address), s.Port), protoOf(s.Protocol)}.String()] = strings.TrimSpace(line + " " + strings.Join(names, " "))
		}
	})
	return out
}

func sortStrings(s []string) {
	for i := range s {
		for j := i; j > 0 && s[j] < s[j-1]; j-- {
			s[j], s[j-1] = s[j-1], s[j]
		}
	}
}

// eventually waits for what must become so.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatal("never so: " + what)
}

// Applying the same state again writes nothing, knowing or reading it, and so
// does a process that starts anew. One endpoint more is a few requests.
func TestApplyAgain(t *testing.T) {
	w := newWorld(t, false)
	snap := proxytest.Cases()[0].Setup.Snapshot
	cfg := Config{Trace: true}
	b := inWorld(t, w, cfg)
	if rep := mustApply(t, b, snap, proxy.Overlay{}); !rep.Full || rep.Rules == 0 {
		t.Errorf("the first: %+v", rep)
	}
	if rep := mustApply(t, b, snap, proxy.Overlay{}); rep.Full || rep.Rules != 0 {
		t.Errorf("the second: %+v", rep)
	}
	b.Forget()
	if rep := mustApply(t, b, snap, proxy.Overlay{}); !rep.Full || rep.Rules != 0 {
		t.Errorf("after Forget: %+v", rep)
	}
	b = inWorld(t, w, cfg)
	if rep := mustApply(t, b, snap, proxy.Overlay{}); !rep.Full || rep.Rules != 0 {
		t.Errorf("by another process: %+v", rep)
	}
	more := proxytest.Services("t/one tcp 10.96.0.11:80 a:8080 c:8080")
	old := *snap
	for i := range snap.Services {
		if snap.Services[i].Name.Name == "one" {
			old.Services = append(append(append([]proxy.Service(nil), snap.Services[:i]...), more.Services[0]), snap.Services[i+1:]...)
			old.Services[i].Name = snap.Services[i].Name
		}
	}
	if rep := mustApply(t, b, &old, proxy.Overlay{}); rep.Full || rep.Rules == 0 || rep.Rules > 4 {
		t.Errorf("one endpoint more: %+v", rep)
	}
	if got := servers(t, w)["10.96.0.11:80/tcp"]; got != "rr a c" {
		t.Errorf("got %q", got)
	}
}

// What others have stays, what was ours is removed, by us and by who comes after
// us; --take-over and excluded ranges do as they say.
func TestOwnership(t *testing.T) {
	w := newWorld(t, false)
	foreign := func(addr string) *mobyipvs.Service {
		a := netip.MustParseAddrPort(addr)
		return &mobyipvs.Service{Address: a.Addr().AsSlice(), Port: a.Port(), Protocol: 6, AddressFamily: afInet, SchedName: "wlc", Netmask: 1<<32 - 1}
	}
	theirs := []string{"192.0.2.1:9000", "203.0.113.200:80", "10.96.7.7:80"}
	inKernel(t, w, func(h *mobyipvs.Handle) {
		for _, a := range theirs {
			w.Must(h.NewService(foreign(a)))
		}
	})
	b := inWorld(t, w, Config{})
	mustApply(t, b, proxytest.Services(`
		t/web tcp 10.96.0.10:80 nodeport=30080 a:8080
		t/dns udp 10.96.0.11:53 nodeport=30053 a:5353`), proxy.Overlay{})
	has := func(want ...string) {
		t.Helper()
		got := servers(t, w)
		for _, k := range want {
			if _, ok := got[k+"/tcp"]; !ok {
				t.Errorf("%s is gone: %v", k, got)
			}
			delete(got, k+"/tcp")
		}
		delete(got, "10.96.0.11:53/udp")
		delete(got, "192.0.2.1:30053/udp")
		if len(got) != 0 {
			t.Errorf("too many: %v", got)
		}
	}
	has(append(theirs, "10.96.0.10:80", "192.0.2.1:30080")...)

	// Somebody who knows nothing but what the kernel holds.
	b = inWorld(t, w, Config{})
	mustApply(t, b, proxytest.Services("t/web tcp 10.96.0.12:80 a:8080"), proxy.Overlay{})
	w.Must(b.Drain())
	has(append(theirs, "10.96.0.12:80")...)

	// A Service at an address that somebody else serves.
	_, err := b.Apply(t.Context(), b.Render(proxytest.Services("t/web tcp 10.96.0.12:80 a:8080\nt/seven tcp 10.96.7.7:80 a:8080"), proxy.Overlay{}))
	if err == nil || !strings.Contains(err.Error(), "Service t/seven tcp is not programmed: virtual server 10.96.7.7:80/tcp is not ours") {
		t.Errorf("%v", err)
	}
	has(append(theirs, "10.96.0.12:80")...)

	b = inWorld(t, w, Config{TakeOver: true, ExcludeCIDRs: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}})
	mustApply(t, b, proxytest.Services("t/seven tcp 10.96.7.7:80 a:8080"), proxy.Overlay{})
	w.Must(b.Drain())
	has("203.0.113.200:80", "10.96.7.7:80")
	if got := servers(t, w)["10.96.7.7:80/tcp"]; got != "rr a" {
		t.Errorf("taken over as %q", got)
	}
}

// Cleanup leaves nothing but what others have.
func TestCleanup(t *testing.T) {
	w := newWorld(t, false)
	b := inWorld(t, w, Config{Trace: true})
	w.Must(b.Cleanup(t.Context())) // of nothing
	mustApply(t, b, proxytest.Cases()[0].Setup.Snapshot, proxy.Overlay{})
	a := netip.MustParseAddrPort("203.0.113.200:80")
	inKernel(t, w, func(h *mobyipvs.Handle) {
		w.Must(h.NewService(&mobyipvs.Service{Address: a.Addr().AsSlice(), Port: 80, Protocol: 6, AddressFamily: afInet, SchedName: "rr", Netmask: 1<<32 - 1}))
	})
	for range 2 {
		b = inWorld(t, w, Config{})
		w.Must(b.Cleanup(t.Context()))
		if got := servers(t, w); len(got) != 1 || got["203.0.113.200:80/tcp"] != "rr" {
			t.Errorf("left: %v", got)
		}
		w.Must(w.Node.Do(func() error {
			if Present() {
				t.Error("the device or a set is left")
			}
			sets, err := netlink.IpsetListAll()
			if len(sets) != 0 {
				t.Errorf("sets left: %v", sets)
			}
			return err
		}))
		for _, f := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
			have, err := b.cfg.Tools.Save(t.Context(), xtables.Legacy, f, "", false)
			w.Must(err)
			if have.Rules() != 0 {
				t.Errorf("rules left:\n%s", have)
			}
			for _, table := range have.Tables {
				for _, c := range table.Chains {
					if c.Policy == "-" {
						t.Errorf("chain %s is left", c.Name)
					}
				}
			}
		}
	}
}

// hold opens a connection that stays open: the pod answers each line.
func hold(t *testing.T, w *proxytest.World, from proxytest.Source, to netip.AddrPort) net.Conn {
	t.Helper()
	var c net.Conn
	w.Must(w.NS[from].Do(func() (err error) {
		c, err = net.DialTimeout("tcp", to.String(), 5*time.Second)
		return err
	}))
	t.Cleanup(func() { c.Close() })
	return c
}

// cut resets a connection, which IPVS forgets after 10 s; it remembers one that
// was closed for two minutes.
func cut(c net.Conn) {
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
}

// echo has pods answer what they are sent, at port 9999.
func echo(t *testing.T, w *proxytest.World, pods ...proxytest.Source) {
	t.Helper()
	for _, p := range pods {
		w.Must(w.NS[p].Do(func() error {
			l, err := net.Listen("tcp", ":9999")
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
					t.Cleanup(func() { c.Close() })
					go func() {
						fmt.Fprintln(c, p)
						_, _ = io.Copy(c, c)
						c.Close()
					}()
				}
			}()
			return nil
		}))
	}
}

func readLine(t *testing.T, c net.Conn) string {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, 64)
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b[:n]))
}

func ask(t *testing.T, c net.Conn, what string) {
	t.Helper()
	if _, err := fmt.Fprintln(c, what); err != nil {
		t.Fatal(err)
	}
	if got := readLine(t, c); got != what {
		t.Fatalf("got %q back, want %q", got, what)
	}
}

// A long-lived connection survives the removal of its endpoint, and of the whole
// Service, and ends; no new one goes there; then nothing is left. One whose time
// is up is let go.
func TestGracefulTermination(t *testing.T) {
	w := newWorld(t, false)
	echo(t, w, proxytest.FromA, proxytest.FromB)
	b := inWorld(t, w, Config{})
	vip := netip.MustParseAddrPort("10.96.0.10:80")
	both := proxytest.Services("t/web tcp 10.96.0.10:80 nodeport=30080 a:9999 b:9999")
	one := proxytest.Services("t/web tcp 10.96.0.10:80 nodeport=30080 b:9999")
	mustApply(t, b, both, proxy.Overlay{})
	held := hold(t, w, proxytest.FromOutside, vip)
	if who := readLine(t, held); who != "a" {
		cut(held)
		held = hold(t, w, proxytest.FromOutside, vip)
		if who = readLine(t, held); who != "a" {
			t.Fatalf("two connections by rr, none to a: %s", who)
		}
	}
	mustApply(t, b, one, proxy.Overlay{})
	w.Must(b.Drain())
	if got := servers(t, w)["10.96.0.10:80/tcp"]; got != "rr a:0 b" {
		t.Errorf("with a connection: %q", got)
	}
	if got := servers(t, w)["192.0.2.1:30080/tcp"]; got != "rr b" { // nobody there
		t.Errorf("without one: %q", got)
	}
	for range 6 {
		c := hold(t, w, proxytest.FromOutside, vip)
		if who := readLine(t, c); who != "b" {
			t.Errorf("a new connection went to %s", who)
		}
		cut(c)
	}
	ask(t, held, "still there")

	// It comes back and goes again.
	mustApply(t, b, both, proxy.Overlay{})
	if got := servers(t, w)["10.96.0.10:80/tcp"]; got != "rr a b" {
		t.Errorf("it came back as %q", got)
	}
	mustApply(t, b, one, proxy.Overlay{})

	// The last endpoint goes, and then the Service itself.
	mustApply(t, b, proxytest.Services("t/web tcp 10.96.0.10:80"), proxy.Overlay{})
	w.Must(b.Drain())
	ask(t, held, "no endpoints")
	if r := w.From(proxytest.FromOutside, conntrack.TCP, vip, 2*time.Second); r.Outcome() != "refused" {
		t.Errorf("a Service without endpoints: %s", r.Outcome())
	}
	mustApply(t, b, proxytest.Services(""), proxy.Overlay{})
	w.Must(b.Drain())
	ask(t, held, "no Service")
	// A new process does not forget whose it is.
	b = inWorld(t, w, Config{GracePeriod: time.Hour})
	mustApply(t, b, proxytest.Services(""), proxy.Overlay{})
	w.Must(b.Drain())
	ask(t, held, "another proxy")
	if r := w.From(proxytest.FromOutside, conntrack.TCP, vip, 2*time.Second); r.Outcome() == "answered" {
		t.Error("a new connection to a Service that is gone was answered")
	}
	cut(held)
	eventually(t, "all virtual servers are gone", func() bool {
		w.Must(b.Drain())
		return len(servers(t, w)) == 0
	})
	w.Must(w.Node.Do(func() error {
		h := newHeld()
		k := &kernel{}
		if _, err := k.readSets(h); err != nil {
			return err
		}
		if len(h.entries) != 0 {
			t.Errorf("members of sets left: %v", h.entries)
		}
		err := k.readAddrs(h)
		if len(h.bound) != 0 {
			t.Errorf("addresses left: %v", h.bound)
		}
		return err
	}))

	// The limit.
	b = inWorld(t, w, Config{GracePeriod: 50 * time.Millisecond})
	mustApply(t, b, both, proxy.Overlay{})
	c := hold(t, w, proxytest.FromOutside, vip)
	readLine(t, c)
	mustApply(t, b, proxytest.Services(""), proxy.Overlay{})
	eventually(t, "its time is up", func() bool {
		w.Must(b.Drain())
		return len(servers(t, w)) == 0
	})
	c.SetReadDeadline(time.Now().Add(time.Second))
	fmt.Fprintln(c, "anybody?")
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the connection goes on")
	} else if errors.Is(err, io.EOF) {
		t.Errorf("the endpoint closed: %v", err)
	}
}

// An endpoint that is out keeps its connections for as long as it takes.
func TestOverlayKeepsConnections(t *testing.T) {
	w := newWorld(t, false)
	echo(t, w, proxytest.FromA, proxytest.FromB)
	b := inWorld(t, w, Config{GracePeriod: time.Nanosecond})
	snap := proxytest.Services("t/web tcp 10.96.0.10:80 a:9999 b:9999")
	mustApply(t, b, snap, proxy.Overlay{})
	first, second := hold(t, w, proxytest.FromOutside, netip.MustParseAddrPort("10.96.0.10:80")), hold(t, w, proxytest.FromOutside, netip.MustParseAddrPort("10.96.0.10:80"))
	readLine(t, first)
	readLine(t, second)
	out := proxy.Overlay{Out: map[netip.AddrPort]proxy.Outage{netip.MustParseAddrPort("10.244.1.2:9999"): {Reason: "test"}}}
	mustApply(t, b, snap, out)
	w.Must(b.Drain())
	if got := servers(t, w)["10.96.0.10:80/tcp"]; got != "rr a:0 b" {
		t.Errorf("got %q", got)
	}
	ask(t, first, "one")
	ask(t, second, "two")
	mustApply(t, b, snap, proxy.Overlay{})
	if got := servers(t, w)["10.96.0.10:80/tcp"]; got != "rr a b" {
		t.Errorf("got %q", got)
	}
}

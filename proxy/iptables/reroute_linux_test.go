package iptables

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// silent has a pod drop what comes to a port, until heal.
func silent(t *testing.T, w *proxytest.World, s proxytest.Source, cfg *Config) (heal func()) {
	t.Helper()
	runner := xtables.NewRunner(xtables.RunnerConfig{Tools: xtables.Tools{Netns: w.NS[s].Fd()}, Flavour: flavourOf(t, cfg), Family: cfg.Family})
	do := func(verb string) {
		t.Helper()
		rep, err := runner.Apply(t.Context(), xtables.Plan{{Units: []xtables.Unit{{
			Table: "filter", Owner: "the test", Lines: []string{verb + " INPUT -p tcp -m tcp --dport 8080 -j DROP"},
		}}}})
		if err != nil || len(rep.Failed) > 0 {
			t.Fatal(err, rep.Failed)
		}
	}
	do("-A")
	return func() { do("-D") }
}

func flavourOf(t *testing.T, cfg *Config) xtables.Flavour {
	t.Helper()
	f, err := xtables.ParseFlavour(cfg.Flavour)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// rerouteWorld is a world in which a Backend may reroute, and its table of
// connection tracking.
func rerouteWorld(t *testing.T, flavour string, six bool) (w *proxytest.World, cfg Config, table *conntrack.Conn) {
	t.Helper()
	w = proxytest.NewWorld(t, six)
	cfg = Config{Flavour: flavour, Reroute: true, Trace: true, ClusterCIDRs: []netip.Prefix{proxytest.ClusterCIDR}}
	if six {
		cfg.Family, cfg.ClusterCIDRs[0] = xtables.IPv6, proxytest.In6Prefix(proxytest.ClusterCIDR)
	}
	cfg.Tools.Netns = w.Node.Fd()
	w.Must(w.Node.Do(func() (err error) { table, err = conntrack.Open(conntrack.Config{}); return err }))
	t.Cleanup(func() { table.Close() })
	return w, cfg, table
}

// stuckAt waits for a connection whose SYN went to an endpoint and was not
// answered.
func stuckAt(t *testing.T, table *conntrack.Conn, ep netip.AddrPort) proxy.Stuck {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		var found proxy.Stuck
		err := table.Dump(t.Context(), func(f conntrack.Flow) error {
			if f.Orig.Proto() == conntrack.TCP && f.Reply.Src() == ep && f.State == conntrack.TCPSynSent {
				found = proxy.Stuck{Tuple: f.Orig, Tried: []netip.AddrPort{ep}}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if found.Tried != nil {
			return found
		}
	}
	t.Fatal("no connection is stuck")
	return proxy.Stuck{}
}

// TestReroute moves connections that a silent pod does not answer, session
// affinity and masquerading included, and touches no others.
func TestReroute(t *testing.T) {
	for i := range 4 {
		flavour, six := []string{"nft", "legacy"}[i&1], i&2 != 0
		name := flavour
		if six {
			name += " ipv6"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, cfg, table := rerouteWorld(t, flavour, six)
			silent(t, w, proxytest.FromA, &cfg)
			at := func(s string) netip.AddrPort {
				a := addrPort(s)
				return netip.AddrPortFrom(w.Addr(a.Addr()), a.Port())
			}
			b := New(cfg)
			watching, stop := context.WithCancel(t.Context())
			watched := make(chan error, 1)
			go func() {
				watched <- b.Watch(watching, func(d proxy.Drift) { t.Errorf("drift: %+v", d) })
			}()
			apply := func(text string) proxy.Report {
				t.Helper()
				snapshot := proxytest.Services(text)
				if six {
					snapshot = proxytest.Snapshot6(snapshot)
				}
				rep, err := b.Apply(t.Context(), b.Render(snapshot, proxy.Overlay{}))
				if err != nil {
					t.Fatal(err)
				}
				return rep
			}
			const both = `
				shop/plain  tcp 10.96.0.10:80 nodeport=30080 a:8080 b:8080
				shop/sticky tcp 10.96.0.11:80 affinity=1h a:8080 b:8080
				shop/alone  tcp 10.96.0.12:80 a:8080
				shop/held   tcp 10.96.0.13:80 b:9090 b:8080
			`
			dead, live := at("10.244.1.2:8080"), at("10.244.1.3:8080")
			for _, row := range []struct {
				from proxytest.Source
				to   string
				seen netip.Addr
			}{
				{proxytest.FromPod, "10.96.0.11:80", w.Addr(proxytest.FromPod.Addr())},
				{proxytest.FromPod, "10.96.0.10:80", w.Addr(proxytest.FromPod.Addr())},
				{proxytest.FromOutside, "192.0.2.1:30080", w.Addr(proxytest.NodeAddr)},
				{proxytest.FromNode, "10.96.0.10:80", w.Addr(proxytest.NodeAddr)},
			} {
				apply(strings.ReplaceAll(both, "a:8080 b:8080", "a:8080")) // all get stuck
				answer := make(chan proxytest.Reply, 1)
				go func() { answer <- w.From(row.from, conntrack.TCP, at(row.to), 20*time.Second) }()
				s := stuckAt(t, table, dead)
				apply(both)
				if n, err := b.Reroute(t.Context(), []proxy.Stuck{s}); err != nil || n != 1 {
					t.Fatalf("moved %d, %v; stats %+v", n, err, b.RerouteStats())
				}
				if r := <-answer; r.Err != nil || r.Endpoint != live || r.Seen != row.seen {
					t.Errorf("%s to %s: %+v, want %s seeing %s", row.from, row.to, r, live, row.seen)
				}
				if n, err := b.Reroute(t.Context(), []proxy.Stuck{s}); err != nil || n != 0 {
					t.Errorf("moved the same try again: %d, %v", n, err)
				}
				if strings.HasPrefix(row.to, "10.96.0.11") {
					for range 3 { // the client that was pinned to the silent pod
						if r := w.From(row.from, conntrack.TCP, at(row.to), 20*time.Second); r.Err != nil || r.Endpoint != live {
							t.Errorf("after it was moved: %+v", r)
						}
					}
				}
			}
			// One that was answered is left alone.
			c := held(t, w)
			answered := proxy.Stuck{Tried: []netip.AddrPort{at("10.244.1.3:9090")}, Tuple: conntrack.NewTuple(conntrack.TCP,
				addrPort(c.LocalAddr().String()), at("10.96.0.13:80"))}
			before := b.RerouteStats()
			if n, err := b.Reroute(t.Context(), []proxy.Stuck{answered}); err != nil || n != 0 {
				t.Errorf("moved %d that were answered, %v", n, err)
			}
			if _, err := c.Write([]byte("x")); err != nil {
				t.Error(err)
			}
			if n, err := c.Read(make([]byte, 1)); n != 1 || err != nil {
				t.Errorf("an answered connection is broken: %v", err)
			}
			if s := b.RerouteStats(); s.Answered != before.Answered+1 || s.Moved != 4 || s.Rules == 0 {
				t.Errorf("stats %+v", s)
			}
			// One with nowhere else to go, too.
			go w.From(proxytest.FromPod, conntrack.TCP, at("10.96.0.12:80"), time.Second)
			alone := stuckAt(t, table, dead)
			if n, _ := b.Reroute(t.Context(), []proxy.Stuck{alone}); n != 0 || b.RerouteStats().Alone != 1 {
				t.Errorf("moved %d without another endpoint: %+v", n, b.RerouteStats())
			}

			// Rules of ours are in nobody's way: the endpoint they lead to can go,
			// everything compares equal, and in the end nothing is left.
			const other = `shop/plain tcp 10.96.0.10:80 nodeport=30080 c:8080`
			apply(other)
			b.Forget()
			if rep := apply(other); rep.Rules != 0 {
				t.Errorf("the same again wrote %+v", rep)
			}
			if err := b.ReapReroutes(t.Context(), time.Now().Add(time.Hour)); err != nil || b.RerouteStats().Rules != 0 {
				t.Errorf("reaping: %v, %+v", err, b.RerouteStats())
			}
			text, err := cfg.Tools.SaveText(t.Context(), flavourOf(t, &cfg), cfg.Family, "nat", false)
			if err != nil || strings.Contains(text, "-A "+chainReroute) {
				t.Errorf("left: %v\n%s", err, text)
			}
			stop()
			if err := <-watched; err != nil {
				t.Error(err)
			}
			w.Must(b.Cleanup(t.Context()))
			text, err = cfg.Tools.SaveText(t.Context(), flavourOf(t, &cfg), cfg.Family, "nat", false)
			if err != nil || strings.Contains(text, "KPTRACE") {
				t.Errorf("after cleaning up: %v\n%s", err, text)
			}
		})
	}
}

// TestRerouteRace has the pod answer between the look at an entry and its
// deletion: that is counted, by what the kernel says of the entry in the end.
func TestRerouteRace(t *testing.T) {
	t.Parallel()
	w, cfg, table := rerouteWorld(t, "nft", false)
	heal := silent(t, w, proxytest.FromA, &cfg)
	b := New(cfg)
	if _, err := b.Apply(t.Context(), b.Render(proxytest.Services(`shop/plain tcp 10.96.0.10:80 a:8080`), proxy.Overlay{})); err != nil {
		t.Fatal(err)
	}
	var gone *nfnl.Socket
	w.Must(w.Node.Do(func() (err error) { gone, err = nfnl.Open(1 << 20); return err }))
	defer gone.Close()
	w.Must(gone.Join(unix.NFNLGRP_CONNTRACK_DESTROY))
	// destroyed waits for the kernel's notice about an entry and passes it on.
	destroyed := func(t conntrack.Tuple) {
		for status := uint32(0); status == 0; {
			_, err := gone.Drain(func(data []byte) {
				for m := nfnl.NewMessages(data); m.Next(); {
					for a := m.Attrs(); a.Next(); {
						if a.Type == 3 { // CTA_STATUS
							status = a.Uint32()
						}
					}
				}
			})
			w.Must(err)
			if status != 0 {
				b.RerouteDestroyed(t, conntrack.Status(status))
			}
			time.Sleep(time.Millisecond)
		}
	}
	answer := make(chan proxytest.Reply, 1)
	go func() { answer <- w.From(proxytest.FromPod, conntrack.TCP, addrPort("10.96.0.10:80"), 20*time.Second) }()
	for _, answers := range []bool{false, true} {
		s := stuckAt(t, table, addrPort("10.244.1.2:8080"))
		b.apply.Lock()
		f, err := b.stillUnanswered(s.Tuple)
		if err != nil {
			t.Fatal(err)
		}
		if answers {
			heal()
			if r := <-answer; r.Err != nil {
				t.Errorf("with a pod that answers again: %+v", r)
			}
			if _, err := b.stillUnanswered(s.Tuple); !errors.Is(err, errAnswered) {
				t.Errorf("an entry that was answered: %v", err)
			}
		}
		w.Must(b.removeEntry(f))
		b.apply.Unlock()
		destroyed(s.Tuple)
		if got, want := b.RerouteStats().Raced, map[bool]uint64{true: 1}[answers]; got != want {
			t.Errorf("answered in between: %v, counted %d", answers, got)
		}
		b.RerouteDestroyed(s.Tuple, conntrack.SeenReply) // another connection with the same addresses
	}
	if s := b.RerouteStats(); s.Raced != 1 {
		t.Errorf("stats %+v", s)
	}
}

// held opens a connection to the Service shop/held that stays open, at a pod
// that echoes.
func held(t *testing.T, w *proxytest.World) net.Conn {
	t.Helper()
	var l net.Listener
	w.Must(w.NS[proxytest.FromB].Do(func() (err error) {
		l, err = net.Listen("tcp", ":9090")
		return err
	}))
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	for range 64 { // until the echo answers, not the pod's other server
		var c net.Conn
		w.Must(w.NS[proxytest.FromPod].Do(func() (err error) {
			c, err = net.DialTimeout("tcp", netip.AddrPortFrom(w.Addr(netip.MustParseAddr("10.96.0.13")), 80).String(), 20*time.Second)
			return err
		}))
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		b := make([]byte, 1)
		if _, err := c.Write([]byte("e")); err == nil {
			if n, err := c.Read(b); n == 1 && err == nil && b[0] == 'e' {
				return c
			}
		}
	}
	t.Fatal("the echo never answers")
	return nil
}

func addrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

package iptables

import (
	"context"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// silent has a pod drop what comes to a port.
func silent(t *testing.T, w *proxytest.World, s proxytest.Source, flavour xtables.Flavour) {
	t.Helper()
	tools := xtables.Tools{Netns: w.NS[s].Fd()}
	rep, err := xtables.NewRunner(xtables.RunnerConfig{Tools: tools, Flavour: flavour}).Apply(t.Context(), xtables.Plan{{Units: []xtables.Unit{{
		Table: "filter", Owner: "the test", Lines: []string{"-A INPUT -p tcp -m tcp --dport 8080 -j DROP"},
	}}}})
	if err != nil || len(rep.Failed) > 0 {
		t.Fatal(err, rep.Failed)
	}
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
	for _, flavour := range []xtables.Flavour{xtables.NFT, xtables.Legacy} {
		t.Run(flavour.String(), func(t *testing.T) {
			t.Parallel()
			w := proxytest.NewWorld(t, false)
			silent(t, w, proxytest.FromA, flavour)
			var table *conntrack.Conn
			w.Must(w.Node.Do(func() (err error) { table, err = conntrack.Open(conntrack.Config{}); return err }))
			defer table.Close()
			cfg := Config{Flavour: flavour.String(), Reroute: true, Trace: true, ClusterCIDRs: []netip.Prefix{proxytest.ClusterCIDR}}
			cfg.Tools.Netns = w.Node.Fd()
			b := New(cfg)
			watching, stop := context.WithCancel(t.Context())
			watched := make(chan error, 1)
			go func() {
				watched <- b.Watch(watching, func(d proxy.Drift) { t.Errorf("drift: %+v", d) })
			}()
			apply := func(text string) proxy.Report {
				t.Helper()
				rep, err := b.Apply(t.Context(), b.Render(proxytest.Services(text), proxy.Overlay{}))
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
			dead, live := addrPort("10.244.1.2:8080"), addrPort("10.244.1.3:8080")
			for _, row := range []struct {
				from proxytest.Source
				to   string
				seen netip.Addr
			}{
				{proxytest.FromPod, "10.96.0.11:80", proxytest.FromPod.Addr()},
				{proxytest.FromPod, "10.96.0.10:80", proxytest.FromPod.Addr()},
				{proxytest.FromOutside, "192.0.2.1:30080", proxytest.NodeAddr},
				{proxytest.FromNode, "10.96.0.10:80", proxytest.NodeAddr},
			} {
				apply(strings.ReplaceAll(both, "a:8080 b:8080", "a:8080")) // all get stuck
				answer := make(chan proxytest.Reply, 1)
				go func() { answer <- w.From(row.from, conntrack.TCP, addrPort(row.to), 20*time.Second) }()
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
						if r := w.From(row.from, conntrack.TCP, addrPort(row.to), 20*time.Second); r.Err != nil || r.Endpoint != live {
							t.Errorf("after it was moved: %+v", r)
						}
					}
				}
			}
			// One that was answered is left alone.
			c := held(t, w)
			answered := proxy.Stuck{Tried: []netip.AddrPort{addrPort("10.244.1.3:9090")}, Tuple: conntrack.NewTuple(conntrack.TCP,
				addrPort(c.LocalAddr().String()), addrPort("10.96.0.13:80"))}
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
			go w.From(proxytest.FromPod, conntrack.TCP, addrPort("10.96.0.12:80"), time.Second)
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
			text, err := cfg.Tools.SaveText(t.Context(), flavour, xtables.IPv4, "nat", false)
			if err != nil || strings.Contains(text, "-A "+chainReroute) {
				t.Errorf("left: %v\n%s", err, text)
			}
			stop()
			if err := <-watched; err != nil {
				t.Error(err)
			}
			w.Must(b.Cleanup(t.Context()))
			text, err = cfg.Tools.SaveText(t.Context(), flavour, xtables.IPv4, "nat", false)
			if err != nil || strings.Contains(text, "KPTRACE") {
				t.Errorf("after cleaning up: %v\n%s", err, text)
			}
		})
	}
}

// held opens a connection to the Service shop/held that stays open, at a pod
// that echoes.
func held(t *testing.T, w *proxytest.World) net.Conn {
	t.Helper()
	var l net.Listener
	w.Must(w.NS[proxytest.FromB].Do(func() (err error) {
		l, err = net.Listen("tcp4", ":9090")
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
			c, err = net.DialTimeout("tcp", "10.96.0.13:80", 20*time.Second)
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

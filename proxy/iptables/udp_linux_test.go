package iptables

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// TestUDPFollows has clients with fixed source ports that keep sending while
// their endpoint is replaced, and all endpoints and the Service go and come
// back. The rules alone would not move them.
func TestUDPFollows(t *testing.T) {
	steps := []struct{ services, want string }{
		{"shop/dns udp 10.96.0.13:53 nodeport=30053 external=198.51.100.5 a:5353", "a"},
		{"shop/dns udp 10.96.0.13:53 nodeport=30053 external=198.51.100.5 b:5353", "b"},
		{"shop/dns udp 10.96.0.13:53 nodeport=30053 external=198.51.100.5 c:5353 b:5353,dead", "c"},
		{"shop/dns udp 10.96.0.13:53 nodeport=30053 external=198.51.100.5", ""},
		{"shop/dns udp 10.96.0.13:53 nodeport=30053 external=198.51.100.5 a:5353", "a"},
		{"", ""},
		{"shop/dns udp 10.96.0.13:53 nodeport=30053 external=198.51.100.5 b:5353", "b"},
		{"shop/dns udp 10.96.0.13:53 nodeport=30053 external=198.51.100.5 a:5353,terminating b:5353", "b"},
	}
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			t.Parallel()
			w := proxytest.NewWorld(t, false)
			var table *conntrack.Conn
			w.Must(w.Node.Do(func() (err error) { table, err = conntrack.Open(conntrack.Config{}); return err }))
			defer table.Close()
			deleted := 0
			r := conntrack.NewReconciler(conntrack.ReconcilerConfig{Table: table,
				Local: func() (func(netip.Addr) bool, error) {
					return func(a netip.Addr) bool { return a == proxytest.NodeAddr }, nil
				},
				Observe: func(x conntrack.Reconciled) { deleted += x.Deleted }})
			cfg := Config{Flavour: flavour, LocalhostNodePorts: true, Trace: true}
			cfg.Tools.Netns = w.Node.Fd()
			b := New(cfg)

			clients := map[string]net.Conn{}
			for i, to := range []string{"10.96.0.13:53", "192.0.2.1:30053", "198.51.100.5:53"} {
				w.Must(w.NS[proxytest.FromPod].Do(func() error {
					c, err := net.DialUDP("udp4", &net.UDPAddr{Port: 4000 + i}, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to)))
					if err == nil {
						t.Cleanup(func() { c.Close() })
						clients[to] = c
					}
					return err
				}))
			}
			for i, step := range steps {
				s := proxytest.Services(step.services)
				if _, err := b.Apply(t.Context(), b.Render(s, proxy.Overlay{})); err != nil {
					t.Fatal(err)
				}
				if err := r.Reconcile(t.Context(), s.UDPFrontends()); err != nil {
					t.Fatal(err)
				}
				for to, c := range clients {
					if got := ask(c); got != step.want {
						t.Errorf("step %d, %q: %s answered by %q, want %q", i, step.services, to, got, step.want)
					}
				}
			}
			if deleted == 0 {
				t.Error("no entry was deleted")
			}
		})
	}
}

// ask makes one exchange on a connected socket and returns who answered. The
// error of an earlier packet may come first, and its answer too.
func ask(c net.Conn) (who string) {
	b := make([]byte, 64)
	for try := 0; try < 5 && who == ""; try++ {
		if _, err := c.Write([]byte("?")); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
			return err.Error()
		}
		c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if n, err := c.Read(b); err == nil {
			who, _, _ = strings.Cut(string(b[:n]), ":")
		}
	}
	for { // what else was answered
		c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		if _, err := c.Read(b); err != nil {
			return who
		}
	}
}

//go:build benchuserspace

package userspace

import (
	"cmp"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// TestFiveThousandConnections is TestManyConnections with more.
func TestFiveThousandConnections(t *testing.T) { manyConnections(t, 5000) }

// BenchmarkThroughput moves bytes from pod to pod directly, and through the
// proxy, in turns. Rates are MB/s; "x-direct" is the relayed rate as a part of
// the direct one just before. All are medians, so that what else the machine does
// matters little.
func BenchmarkThroughput(b *testing.B) {
	for _, streams := range []int{1, 64} {
		b.Run(fmt.Sprint(streams, "-streams"), func(b *testing.B) {
			var direct, relayed, part float64
			// The world wants a testing.T, which a benchmark has not.
			ok := testing.RunTests(func(_, _ string) (bool, error) { return true, nil }, []testing.InternalTest{{Name: "throughput", F: func(t *testing.T) {
				direct, relayed, part = throughput(t, streams, max(b.N, 3))
			}}})
			if !ok {
				b.Fatal("failed")
			}
			b.ReportMetric(direct, "direct-MB/s")
			b.ReportMetric(relayed, "relayed-MB/s")
			b.ReportMetric(part, "x-direct")
		})
	}
}

// throughput returns the median rates of some rounds, and of their relation.
func throughput(t *testing.T, streams, rounds int) (direct, relayed, part float64) {
	w := proxytest.NewWorld(t, false)
	pod := netip.AddrPortFrom(proxytest.FromB.Addr(), 9000)
	var l net.Listener
	w.Must(w.NS[proxytest.FromB].Do(func() (err error) {
		l, err = net.Listen("tcp4", pod.String())
		return err
	}))
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				n, err := io.Copy(io.Discard, c)
				_ = err
				fmt.Fprint(c, n)
			}()
		}
	}()
	b := New(Config{Flavour: "nft", Drain: -1})
	b.cfg.Tools.Netns = w.Node.Fd()
	svc := proxytest.Services("shop/a tcp 10.96.0.10:80").Services[0]
	svc.Endpoints = []proxy.Endpoint{{Addr: pod, Ready: true, Serving: true}}
	if _, err := b.Apply(t.Context(), b.Render(&proxy.Snapshot{Node: proxytest.Node(), Services: []proxy.Service{svc}}, proxy.Overlay{})); err != nil {
		t.Fatal(err)
	}
	defer b.close()
	const total = 512 << 20
	chunk := make([]byte, 256<<10)
	send := func(to string) float64 {
		var wg sync.WaitGroup
		conns := make([]net.Conn, streams)
		for i := range conns {
			w.Must(w.NS[proxytest.FromPod].Do(func() (err error) {
				conns[i], err = net.DialTimeout("tcp4", to, patience)
				return err
			}))
		}
		start := time.Now()
		for _, c := range conns {
			wg.Go(func() {
				defer c.Close()
				for left := total / streams; left > 0; left -= len(chunk) {
					if _, err := c.Write(chunk); err != nil {
						t.Error(err)
						return
					}
				}
				_ = c.(*net.TCPConn).CloseWrite()
				if got, _ := io.ReadAll(c); string(got) != strconv.Itoa(total/streams) {
					t.Errorf("%s arrived of %d", got, total/streams)
				}
			})
		}
		wg.Wait()
		return total / 1e6 / time.Since(start).Seconds()
	}
	all := make([][3]float64, rounds)
	for i := range all {
		d, r := send(pod.String()), send("10.96.0.10:80")
		all[i] = [3]float64{d, r, r / d}
	}
	var medians [3]float64
	for i := range medians {
		slices.SortFunc(all, func(a, b [3]float64) int { return cmp.Compare(a[i], b[i]) })
		medians[i] = all[rounds/2][i]
	}
	return medians[0], medians[1], medians[2]
}

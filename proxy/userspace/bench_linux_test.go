//go:build benchuserspace

package userspace

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/proxytest"
)

// heldEnv makes TestHoldHelper a client that holds so many connections open.
const heldEnv = "KPTRACE_TEST_HOLD"

// TestManyConnections relays 5,000 connections at once, and says what each
// costs in this process. The clients are another process: the limit of
// descriptors is each one's own.
func TestManyConnections(t *testing.T) {
	const n = 5000
	// In the sandbox's own namespace: entering another one takes a thread for
	// each dial.
	ns, err := netns.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	p := newPlaceIn(t, Config{DialLimits: []time.Duration{patience}}, ns)
	t.Cleanup(func() {
		if err := p.b.Cleanup(context.Background()); err != nil {
			t.Error(err)
		}
	})
	var l net.Listener
	p.must(p.ns.Do(func() (err error) {
		l, err = net.Listen("tcp4", "127.0.1.1:0")
		return err
	}))
	defer l.Close()
	p.must(p.apply(serviceOf("a", false, vip, addrOf(l.Addr()))))
	server := make(chan []net.Conn, 1)
	go func() {
		var held []net.Conn
		for range n {
			c, err := l.Accept()
			if err != nil {
				break
			}
			held = append(held, c)
		}
		server <- held
	}()
	before := memory()
	in, release := io.Pipe()
	out, answers := io.Pipe()
	child, err := exec.Start(exec.Spec{
		Path: os.Args[0], Args: []string{"-test.run=^TestHoldHelper$", "-test.v"}, Netns: p.ns.Fd(),
		Env: append(os.Environ(), heldEnv+"="+strconv.Itoa(n)), Stdin: in, Stdout: answers, Stderr: os.Stderr,
	})
	p.must(err)
	lines := bufio.NewScanner(out)
	waitFor := func(word string) {
		t.Helper()
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), word) {
				return
			}
		}
		t.Fatalf("the clients ended without %q", word)
	}
	waitFor("held")
	held := <-server
	until(t, "all are relayed", func() bool { return p.b.RelayStats().Connected == n })
	s := p.b.RelayStats()
	if len(held) != n || s.Open != n || s.Waits != 0 || s.Exhausted != 0 || s.Retried != 0 {
		t.Fatalf("%d arrived, stats %+v", len(held), s)
	}
	each := float64(memory()-before) / n
	t.Logf("%d connections relayed at once: %.1f KiB of this process for each, the server's end included", n, each/1024)
	if each > 64<<10 {
		t.Errorf("%.0f bytes for each connection", each)
	}
	for _, c := range held { // each still works
		fmt.Fprint(c, "x")
		c.Close()
	}
	release.Close()
	waitFor("answered " + strconv.Itoa(n))
	go func() { _, _ = io.Copy(io.Discard, out) }()
	if err := child.Wait(); err != nil {
		t.Error(err)
	}
	until(t, "all are gone", func() bool { return p.b.RelayStats().Open == 0 })
}

// memory is what the Go runtime has in use.
func memory() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}

// TestHoldHelper is the clients of TestManyConnections, in a process of theirs;
// alone it has nothing to do.
func TestHoldHelper(t *testing.T) {
	n, _ := strconv.Atoi(os.Getenv(heldEnv))
	if n == 0 {
		return
	}
	var held []net.Conn
	for range n {
		c, err := net.DialTimeout("tcp4", vip, patience)
		if err != nil {
			t.Fatalf("after %d: %v", len(held), err)
		}
		held = append(held, c)
	}
	fmt.Println("held")
	_, _ = io.ReadAll(os.Stdin)
	answered := 0
	for _, c := range held {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if b, err := io.ReadAll(c); err == nil && string(b) == "x" {
			answered++
		}
		c.Close()
	}
	fmt.Println("answered", answered)
}

// BenchmarkThroughput moves bytes from pod to pod directly, and through the
// proxy, in turns. Rates are MB/s; "x-direct" is the relayed rate as a part of
// the direct one.
func BenchmarkThroughput(b *testing.B) {
	for _, streams := range []int{1, 64} {
		b.Run(fmt.Sprint(streams, "-streams"), func(b *testing.B) {
			var direct, relayed float64
			// The world wants a testing.T, which a benchmark has not.
			ok := testing.RunTests(func(_, _ string) (bool, error) { return true, nil }, []testing.InternalTest{{Name: "throughput", F: func(t *testing.T) {
				direct, relayed = throughput(t, streams, max(b.N, 3))
			}}})
			if !ok {
				b.Fatal("failed")
			}
			b.ReportMetric(direct, "direct-MB/s")
			b.ReportMetric(relayed, "relayed-MB/s")
			b.ReportMetric(relayed/direct, "x-direct")
		})
	}
}

// throughput returns the best rates of some rounds.
func throughput(t *testing.T, streams, rounds int) (direct, relayed float64) {
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
	for range rounds {
		direct = max(direct, send(pod.String()))
		relayed = max(relayed, send("10.96.0.10:80"))
	}
	return direct, relayed
}

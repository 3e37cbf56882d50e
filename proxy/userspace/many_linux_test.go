package userspace

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
)

// heldEnv makes TestHoldHelper a client that holds so many connections open.
const heldEnv = "KPTRACE_TEST_HOLD"

// TestManyConnections relays a thousand connections at once. It is not parallel,
// for it measures memory.
func TestManyConnections(t *testing.T) { manyConnections(t, 1000) }

// manyConnections relays n connections at once, checks that each works both
// ways, and says what each costs in this process. The clients are another
// process: the limit of descriptors is each one's own.
func manyConnections(t *testing.T, n int) {
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
	until(t, "all are relayed", func() bool { return p.b.RelayStats().Connected == uint64(n) })
	s := p.b.RelayStats()
	if len(held) != n || s.Open != n || s.Waits != 0 || s.Exhausted != 0 || s.Retried != 0 {
		t.Fatalf("%d arrived, stats %+v", len(held), s)
	}
	each := float64(memory()-before) / float64(n)
	t.Logf("%d connections relayed at once: %.1f KiB of this process for each, the server's end included", n, each/1024)
	if each > 64<<10 {
		t.Errorf("%.0f bytes for each connection", each)
	}
	for _, c := range held { // each still works
		if _, err := fmt.Fprint(c, "x"); err != nil {
			t.Error(err)
		}
	}
	for _, c := range held {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if got, err := io.ReadAll(c); err != nil || string(got) != "y" {
			t.Errorf("a client said %q, %v", got, err)
		}
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
	for _, c := range held {
		fmt.Fprint(c, "y")
		_ = c.(*net.TCPConn).CloseWrite()
	}
	_, _ = io.ReadAll(os.Stdin)
	answered, end := 0, time.Now().Add(patience)
	for _, c := range held {
		_ = c.SetReadDeadline(end)
		if b, err := io.ReadAll(c); err == nil && string(b) == "x" {
			answered++
		}
		c.Close()
	}
	fmt.Println("answered", answered)
}

package userspace

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

const vip = "10.96.0.10:80"

// TestTCP follows a Service through its life.
func TestTCP(t *testing.T) {
	t.Parallel()
	p := newPlace(t, Config{})
	one, two := p.named("127.0.1.1:0", "one"), p.named("127.0.1.2:0", "two")
	says := func(want, at string) {
		t.Helper()
		if got, err := p.ask("127.0.0.5", at); err != nil || got != want {
			t.Errorf("%s says %q, %v; want %q", at, got, err, want)
		}
	}
	p.must(p.apply(serviceOf("a", false, vip, one)))
	says("one", vip)
	p.must(p.apply(serviceOf("a", false, vip, two))) // another endpoint
	says("two", vip)
	p.must(p.apply(serviceOf("a", false, "10.96.0.10:81", two), serviceOf("b", false, "10.96.0.11:80", one))) // another port
	says("two", "10.96.0.10:81")
	says("one", "10.96.0.11:80")
	p.nobody(vip)
	p.must(p.apply(serviceOf("b", false, "10.96.0.11:80", one)))
	p.nobody("10.96.0.10:81")
	says("one", "10.96.0.11:80")
	p.must(p.apply(serviceOf("b", false, "10.96.0.11:80")))
	p.nobody("10.96.0.11:80")
	p.must(p.apply(serviceOf("b", false, "10.96.0.11:80", one, two)))
	if a, _ := p.ask("127.0.0.5", "10.96.0.11:80"); a == "" {
		t.Error("with endpoints again: no answer")
	}
	// The proxy's own port is nobody's door.
	for _, l := range p.b.listeners {
		if got, err := p.ask("127.0.0.5", fmt.Sprintf("127.0.0.1:%d", l.port)); got != "" {
			t.Errorf("the proxy's own port says %q, %v", got, err)
		}
	}
	if s := p.b.RelayStats(); s.Direct != 1 || s.Accepted != 7 || s.Connected != 6 || s.Listeners != 1 {
		t.Errorf("stats %+v", s)
	}
}

// TestHalfClose sends until the end of the request and gets the answer after
// it, and the other way round; and a reset stays a reset.
func TestHalfClose(t *testing.T) {
	t.Parallel()
	p := newPlace(t, Config{})
	sum := p.listen("127.0.1.1:0", func(c *net.TCPConn) {
		all, _ := io.ReadAll(c)
		fmt.Fprintf(c, "got %d", len(all))
	})
	early := make(chan string, 1)
	first := p.listen("127.0.1.2:0", func(c *net.TCPConn) {
		fmt.Fprint(c, "hello")
		_ = c.CloseWrite()
		all, _ := io.ReadAll(c)
		early <- string(all)
	})
	reset := p.listen("127.0.1.3:0", func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 1))
		_ = c.SetLinger(0)
	})
	p.must(p.apply(serviceOf("a", false, vip, sum), serviceOf("b", false, "10.96.0.11:80", first), serviceOf("c", false, "10.96.0.12:80", reset)))

	c, err := p.dial("127.0.0.5", "tcp", vip)
	p.must(err)
	body := make([]byte, 3<<20)
	rand.New(rand.NewSource(1)).Read(body)
	_, err = c.Write(body)
	p.must(err)
	p.must(c.(*net.TCPConn).CloseWrite())
	if got, err := io.ReadAll(c); err != nil || string(got) != "got 3145728" {
		t.Errorf("%q, %v", got, err)
	}

	c, err = p.dial("127.0.0.5", "tcp", "10.96.0.11:80")
	p.must(err)
	if got, err := io.ReadAll(c); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	fmt.Fprint(c, "bye")
	c.Close()
	if got := <-early; got != "bye" {
		t.Errorf("after the endpoint's end it got %q", got)
	}

	c, err = p.dial("127.0.0.5", "tcp", "10.96.0.12:80")
	p.must(err)
	fmt.Fprint(c, "x")
	if _, err := io.ReadAll(c); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("after a reset: %v", err)
	}
	until(t, "all ends are told", func() bool { return len(p.told(proxy.RelayClosed)) == 3 })
	ends := map[proxy.RelayEnd]proxy.RelayEvent{}
	for _, e := range p.told(proxy.RelayClosed) {
		ends[e.End] = e
	}
	if e := ends[proxy.EndedByClient]; e.Out != 3<<20 || e.In != 11 {
		t.Errorf("client first: %+v", e)
	}
	if e := ends[proxy.EndedByEndpoint]; e.Out != 3 || e.In != 5 {
		t.Errorf("endpoint first: %+v", e)
	}
	if e := ends[proxy.EndedResetEndpoint]; e.Out != 1 {
		t.Errorf("reset: %+v", ends)
	}
}

// TestIntegrity sends random bytes both ways at once through many connections,
// with and without pipes, and with the smallest ones.
func TestIntegrity(t *testing.T) {
	t.Parallel()
	for _, pipes := range []struct{ max, size int }{{1000, 0}, {1000, os.Getpagesize()}, {3, 0}, {0, 0}} {
		t.Run(fmt.Sprintf("%d pipes of %d", pipes.max, pipes.size), func(t *testing.T) {
			p := newPlace(t, Config{})
			p.b.pipes.max, p.b.pipes.size = pipes.max, pipes.size
			echo := p.listen("127.0.1.1:0", func(c *net.TCPConn) { _, _ = io.Copy(c, c) })
			p.must(p.apply(serviceOf("a", false, vip, echo)))
			var wg sync.WaitGroup
			for i := range 20 {
				c, err := p.dial("127.0.0.5", "tcp", vip)
				p.must(err)
				wg.Go(func() {
					body := make([]byte, 1<<20)
					rand.New(rand.NewSource(int64(i))).Read(body)
					go func() {
						_, _ = c.Write(body)
						_ = c.(*net.TCPConn).CloseWrite()
					}()
					got, err := io.ReadAll(c)
					if err != nil || !bytes.Equal(got, body) {
						t.Errorf("%d of %d bytes came back, equal %v: %v", len(got), len(body), bytes.Equal(got, body), err)
					}
				})
			}
			wg.Wait()
		})
	}
}

// TestRetry has one of three endpoints dead: no connection is lost, and none
// waits for more than one dial.
func TestRetry(t *testing.T) {
	t.Parallel()
	for _, dead := range []string{"refusing", "silent"} {
		t.Run(dead, func(t *testing.T) {
			t.Parallel()
			p := newPlace(t, Config{})
			one, two := p.named("127.0.1.1:0", "one"), p.named("127.0.1.2:0", "two")
			bad, why := netip.MustParseAddrPort("127.0.1.3:9"), proxy.FailedRefused
			if dead == "silent" {
				bad, why = p.hole("127.0.1.3:9"), proxy.FailedTimeout
			}
			p.must(p.apply(serviceOf("a", false, vip, one, two, bad)))
			var wg sync.WaitGroup
			const n = 60
			for range n {
				wg.Go(func() {
					if got, err := p.ask("127.0.0.5", vip); err != nil || got != "one" && got != "two" {
						t.Errorf("%q, %v", got, err)
					}
				})
			}
			wg.Wait()
			until(t, "all ends are told", func() bool { return len(p.told(proxy.RelayClosed)) == n })
			failures := map[uint64]int{}
			for _, e := range p.told(proxy.RelayFailed) {
				if failures[e.ID]++; failures[e.ID] > 1 {
					t.Errorf("connection %d failed twice", e.ID)
				}
				if e.Failure != why {
					t.Errorf("failure %d, want %d", e.Failure, why)
				}
			}
			if len(failures) < n/3-2 || len(failures) > n/3+n/6 {
				t.Errorf("%d of %d met the dead endpoint", len(failures), n)
			}
			if s := p.b.RelayStats(); int(s.Retried) != len(failures) || s.Unserved != 0 || s.Connected != n {
				t.Errorf("stats %+v", s)
			}
			for _, e := range p.told(proxy.RelayPick) {
				if r := p.index(e.Tag); r == nil || r.Endpoint.Port() == 0 || e.Tuple.Proto() != conntrack.TCP || e.Tuple.Dst().String() != vip {
					t.Errorf("pick %+v stands for %+v", e, r)
				}
			}
		})
	}
}

// index finds what a tag stands for in what is served.
func (p *place) index(tag proxy.Tag) *proxy.Rule {
	for _, l := range p.b.listeners {
		if r := l.target.Load().program.Index()[tag.String()]; r != nil {
			return r
		}
	}
	return nil
}

// TestAllDead resets a connection that nobody could take, after four tries.
func TestAllDead(t *testing.T) {
	t.Parallel()
	p := newPlace(t, Config{})
	svc := serviceOf("a", false, vip, netip.MustParseAddrPort("127.0.1.3:9"), netip.MustParseAddrPort("127.0.1.4:9"))
	svc.Affinity = time.Hour
	p.must(p.apply(svc))
	if _, err := p.ask("127.0.0.5", vip); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("got %v, want a reset", err)
	}
	until(t, "the end is told", func() bool { return len(p.told(proxy.RelayClosed)) == 1 })
	if n := len(p.told(proxy.RelayFailed)); n != 4 || p.told(proxy.RelayClosed)[0].End != proxy.EndedUnanswered {
		t.Errorf("%d tries, %+v", n, p.told(proxy.RelayClosed))
	}
	if s := p.b.RelayStats(); s.AffinityResets != 4 || s.AffinityClients != 0 || s.Unserved != 1 {
		t.Errorf("stats %+v", s)
	}
}

// TestAffinity: clients stay, and move for good when their endpoint fails.
func TestAffinity(t *testing.T) {
	t.Parallel()
	p := newPlace(t, Config{})
	var up atomic.Pointer[net.TCPListener]
	var l *net.TCPListener
	p.must(p.ns.Do(func() (err error) {
		l, err = net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 1, 1)})
		return err
	}))
	up.Store(l)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, "one")
			c.Close()
		}
	}()
	svc := serviceOf("a", false, vip, addrOf(l.Addr()), p.named("127.0.1.2:0", "two"))
	svc.Affinity = time.Hour
	p.must(p.apply(svc))
	say := func(from string) string {
		t.Helper()
		got, err := p.ask(from, vip)
		p.must(err)
		return got
	}
	first := map[string]string{}
	for _, from := range []string{"127.0.0.5", "127.0.0.6"} {
		first[from] = say(from)
		for range 5 {
			if got := say(from); got != first[from] {
				t.Errorf("%s was moved to %s", from, got)
			}
		}
	}
	if first["127.0.0.5"] == first["127.0.0.6"] {
		t.Error("both clients got one endpoint")
	}
	l.Close()
	for from := range first {
		for range 3 {
			if got := say(from); got != "two" {
				t.Errorf("%s got %s", from, got)
			}
		}
	}
	words := map[string]int{}
	for _, e := range p.told(proxy.RelayPick) {
		words[e.Affinity]++
	}
	if words["new"] != 2 || words["reset"] != 1 {
		t.Errorf("affinity words %v", words)
	}
}

// TestFlapping changes endpoints all the time while connections are dialled, some
// of them to one that never answers.
func TestFlapping(t *testing.T) {
	t.Parallel()
	p := newPlace(t, Config{})
	one, two := p.named("127.0.1.1:0", "one"), p.named("127.0.1.2:0", "two")
	bad, hole := netip.MustParseAddrPort("127.0.1.3:9"), p.hole("127.0.1.4:9")
	sets := [][]netip.AddrPort{{one, bad}, {bad, two}, {one, hole}, {two}}
	p.must(p.apply(serviceOf("a", false, vip, sets[0]...)))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 4 {
		from := fmt.Sprintf("127.0.0.%d", 10+i)
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if got, err := p.ask(from, vip); err != nil || got == "" {
					t.Errorf("%q, %v", got, err)
					return
				}
			}
		})
	}
	i := 0
	until(t, "dials failed either way while endpoints changed", func() bool {
		p.must(p.apply(serviceOf("a", false, vip, sets[i%len(sets)]...)))
		i++
		s := p.b.RelayStats()
		return i >= 40 && s.TimedOut >= 3 && s.Refused >= 3
	})
	close(stop)
	wg.Wait()
	if s := p.b.RelayStats(); s.Unserved != 0 {
		t.Errorf("stats %+v", s)
	}
}

// TestNeverReads has clients that read nothing while endpoints send without end:
// they cost a bounded number of pipes, and others are served.
func TestNeverReads(t *testing.T) {
	t.Parallel()
	p := newPlace(t, Config{})
	p.b.pipes.max = 4
	flood := p.listen("127.0.1.1:0", func(c *net.TCPConn) {
		b := make([]byte, 64<<10)
		for {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	})
	p.must(p.apply(serviceOf("flood", false, vip, flood), serviceOf("good", false, "10.96.0.11:80", p.named("127.0.1.2:0", "good"))))
	var stuck []net.Conn
	for range 12 {
		c, err := p.dial("127.0.0.5", "tcp", vip)
		p.must(err)
		stuck = append(stuck, c)
	}
	until(t, "all are relayed", func() bool { return p.b.RelayStats().Connected == 12 })
	for range 20 {
		if got, err := p.ask("127.0.0.6", "10.96.0.11:80"); err != nil || got != "good" {
			t.Errorf("%q, %v", got, err)
		}
	}
	p.b.pipes.mu.Lock()
	made := p.b.pipes.made
	p.b.pipes.mu.Unlock()
	if made > 4 {
		t.Errorf("%d pipes", made)
	}
	for _, c := range stuck {
		c.Close()
	}
	until(t, "all are gone", func() bool { return p.b.RelayStats().Open == 0 })
}

// TestPortsFull has more Services than ports: those that got one are served, the
// other one is named, and served when there is room.
func TestPortsFull(t *testing.T) {
	t.Parallel()
	p := newPlace(t, Config{Ports: PortRange{20000, 20001}})
	one := p.named("127.0.1.1:0", "one")
	a, b, c := serviceOf("a", false, "10.96.0.10:80", one), serviceOf("b", false, "10.96.0.11:80", one), serviceOf("c", false, "10.96.0.12:80", one)
	err := p.apply(a, b, c)
	if !errors.Is(err, errPortsFull) || !strings.Contains(err.Error(), "shop/c") || !strings.Contains(err.Error(), "20000-20001") {
		t.Errorf("got %v", err)
	}
	for _, at := range []string{"10.96.0.10:80", "10.96.0.11:80"} {
		if got, _ := p.ask("127.0.0.5", at); got != "one" {
			t.Errorf("%s says %q", at, got)
		}
	}
	p.nobody("10.96.0.12:80")
	if s := p.b.RelayStats(); s.PortsFree != 0 || s.PortRange != "20000-20001" {
		t.Errorf("stats %+v", s)
	}
	p.must(p.apply(a, c))
	if got, err := p.ask("127.0.0.5", "10.96.0.12:80"); got != "one" {
		t.Errorf("with a port free: %q, %v", got, err)
	}
}

// TestDescriptorBudget lets few connections through at once: others wait, none
// is lost, and Services that need no more work on.
func TestDescriptorBudget(t *testing.T) {
	t.Parallel()
	p := newPlace(t, Config{MaxDescriptors: 1 + 4*descriptorsPerConn})
	release := make(chan struct{})
	slow := p.listen("127.0.1.1:0", func(c *net.TCPConn) {
		<-release
		fmt.Fprint(c, "slow")
	})
	p.must(p.apply(serviceOf("a", false, vip, slow)))
	var wg sync.WaitGroup
	for range 12 {
		wg.Go(func() {
			if got, err := p.ask("127.0.0.5", vip); err != nil || got != "slow" {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
	until(t, "somebody waits", func() bool { s := p.b.RelayStats(); return s.Waits > 0 && s.Open == 4 })
	if s := p.b.RelayStats(); s.Descriptors > s.MaxDescriptors {
		t.Errorf("stats %+v", s)
	}
	close(release)
	wg.Wait()
}

// TestDrain lets a connection end while the proxy does.
func TestDrain(t *testing.T) {
	t.Parallel()
	p := newPlace(t, Config{Drain: patience})
	release := make(chan struct{})
	p.must(p.apply(serviceOf("a", false, vip, p.listen("127.0.1.1:0", func(c *net.TCPConn) {
		<-release
		fmt.Fprint(c, "last words")
	}))))
	c, err := p.dial("127.0.0.5", "tcp", vip)
	p.must(err)
	until(t, "it is relayed", func() bool { return p.b.RelayStats().Connected == 1 })
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.stop()
	}()
	// One that still gets in is relayed, and its endpoint says nothing before
	// release: it is not waited for.
	until(t, "nothing new is accepted", func() bool {
		late, err := p.dial("127.0.0.6", "tcp", vip)
		if err == nil {
			late.Close()
		}
		return refused(err)
	})
	close(release)
	if got, err := io.ReadAll(c); err != nil || string(got) != "last words" {
		t.Errorf("%q, %v", got, err)
	}
	c.Close()
	<-done
	for _, e := range p.told(proxy.RelayClosed) {
		if e.End == proxy.EndedShutdown {
			t.Errorf("cut off: %+v", e)
		}
	}
	if err := p.apply(); err == nil {
		t.Error("applied after the end")
	}
}

// TestDrainEnds cuts off a connection that does not end in the time there is.
func TestDrainEnds(t *testing.T) {
	t.Parallel()
	p := newPlace(t, Config{Drain: 50 * time.Millisecond})
	p.must(p.apply(serviceOf("a", false, vip, p.listen("127.0.1.1:0", func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) }))))
	c, err := p.dial("127.0.0.5", "tcp", vip)
	p.must(err)
	until(t, "it is relayed", func() bool { return p.b.RelayStats().Connected == 1 })
	p.stop()
	if got, err := io.ReadAll(c); err == nil && len(got) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%q, %v", got, err)
	}
	if ends := p.told(proxy.RelayClosed); len(ends) != 1 || ends[0].End != proxy.EndedShutdown {
		t.Errorf("ends %+v", ends)
	}
}

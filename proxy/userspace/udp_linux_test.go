package userspace

import (
	"bytes"
	"fmt"
	"math/rand"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

const udpVIP = "10.96.0.20:53"

// echoUDP answers each datagram with a name and what it held.
func (p *place) echoUDP(at, name string) netip.AddrPort {
	p.t.Helper()
	var c net.PacketConn
	p.must(p.ns.Do(func() (err error) {
		c, err = net.ListenPacket("udp4", at)
		return err
	}))
	p.t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, maxDatagram)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(append([]byte(name), b[:n]...), from)
		}
	}()
	return addrOf(c.LocalAddr())
}

// exchange sends a datagram and waits for the answer.
func exchange(c net.Conn, payload []byte) ([]byte, error) {
	if _, err := c.Write(payload); err != nil {
		return nil, err
	}
	b := make([]byte, maxDatagram)
	n, err := c.Read(b)
	return b[:n], err
}

func TestUDP(t *testing.T) {
	t.Parallel()
	p := newPlace(t, Config{UDPTimeout: time.Hour})
	one, two := p.echoUDP("127.0.1.1:0", "one "), p.echoUDP("127.0.1.2:0", "two ")
	svc := func(eps ...netip.AddrPort) proxy.Service { return serviceOf("dns", true, udpVIP, eps...) }
	p.must(p.apply(svc(one)))
	c, err := p.dial("127.0.0.5", "udp", udpVIP)
	p.must(err)
	// As large as it gets (RFC 768), and empty.
	for _, n := range []int{65507 - 4, 1, 0} {
		body := make([]byte, n)
		rand.New(rand.NewSource(1)).Read(body)
		if got, err := exchange(c, body); err != nil || !bytes.Equal(got, append([]byte("one "), body...)) {
			t.Errorf("%d bytes: %d came back, %v", n, len(got), err)
		}
	}
	if s := p.b.RelayStats(); s.Sessions != 1 || s.SessionsMade != 1 || s.Datagrams != 3 {
		t.Errorf("stats %+v", s)
	}
	pick := p.told(proxy.RelayPick)[0]
	if pick.Tuple.Dst().String() != udpVIP || pick.Tuple.Src() != addrOf(c.LocalAddr()) || !pick.FromNode {
		t.Errorf("pick %+v", pick)
	}
	// Its endpoint goes: the client moves on, from the same port.
	p.must(p.apply(svc(two)))
	if got, err := exchange(c, []byte("x")); err != nil || string(got) != "two x" {
		t.Errorf("%q, %v", got, err)
	}
	p.must(p.apply())
	until(t, "all sessions are over", func() bool { return p.b.RelayStats().Sessions == 0 })
}

// TestUDPTimeout ends a session through which nothing goes, and makes another
// one for the next datagram.
func TestUDPTimeout(t *testing.T) {
	t.Parallel()
	p := newPlace(t, Config{UDPTimeout: 50 * time.Millisecond})
	p.must(p.apply(serviceOf("dns", true, udpVIP, p.echoUDP("127.0.1.1:0", "one "))))
	c, err := p.dial("127.0.0.5", "udp", udpVIP)
	p.must(err)
	for i := range 2 {
		if got, err := exchange(c, []byte("x")); err != nil || string(got) != "one x" {
			t.Fatalf("%q, %v", got, err)
		}
		until(t, "the session is over", func() bool { return len(p.told(proxy.RelayClosed)) == i+1 })
	}
	for _, e := range p.told(proxy.RelayClosed) {
		if e.End != proxy.EndedIdle || e.Out != 1 || e.In != 5 || e.Age < 50*time.Millisecond {
			t.Errorf("end %+v", e)
		}
	}
	if s := p.b.RelayStats(); s.Sessions != 0 || s.SessionsMade != 2 || s.Out != 2 || s.In != 10 {
		t.Errorf("stats %+v", s)
	}
}

// TestUDPRefused sends the first datagram to another endpoint where the first
// one refuses it.
func TestUDPRefused(t *testing.T) {
	t.Parallel()
	p := newPlace(t, Config{UDPTimeout: time.Minute})
	svc := serviceOf("dns", true, udpVIP, p.echoUDP("127.0.1.1:0", "one "), netip.MustParseAddrPort("127.0.1.3:9"))
	p.must(p.apply(svc))
	const n = 20
	for range n {
		c, err := p.dial("127.0.0.5", "udp", udpVIP)
		p.must(err)
		if got, err := exchange(c, []byte("x")); err != nil || string(got) != "one x" {
			t.Errorf("%q, %v", got, err)
		}
	}
	if s := p.b.RelayStats(); s.Refused == 0 || s.Retried != s.Refused || s.Connected != n {
		t.Errorf("stats %+v", s)
	}
}

// TestUDPFlood has more clients than there are descriptors: what finds no room
// is dropped and counted, memory stays bounded, and TCP is served meanwhile.
func TestUDPFlood(t *testing.T) {
	t.Parallel()
	const room = 64
	p := newPlace(t, Config{UDPTimeout: 500 * time.Millisecond, MaxDescriptors: room})
	p.must(p.apply(serviceOf("dns", true, udpVIP, p.echoUDP("127.0.1.1:0", "")), serviceOf("a", false, vip, p.named("127.0.1.2:0", "one"))))
	var flood []net.Conn
	for i := range 8 * room {
		c, err := p.dial(fmt.Sprintf("127.0.%d.%d", 2+i/200, 1+i%200), "udp", udpVIP)
		p.must(err)
		flood = append(flood, c)
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				_, _ = flood[i%len(flood)].Write([]byte("x"))
			}
		}
	})
	until(t, "datagrams are dropped", func() bool { return p.b.RelayStats().Dropped > 100 })
	for range 5 {
		if got, err := p.ask("127.0.0.6", vip); err != nil || got != "one" {
			t.Errorf("%q, %v", got, err)
		}
	}
	if s := p.b.RelayStats(); s.Sessions > room || s.Descriptors > room {
		t.Errorf("stats %+v", s)
	}
	close(stop)
	wg.Wait()
	until(t, "all sessions are over", func() bool { return p.b.RelayStats().Sessions == 0 })
	c, err := p.dial("127.0.0.5", "udp", udpVIP)
	p.must(err)
	if got, err := exchange(c, []byte("y")); err != nil || string(got) != "y" {
		t.Errorf("after the flood: %q, %v", got, err)
	}
}

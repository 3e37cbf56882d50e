package nflog

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/trace"
)

// flavours are the two ways into the kernel's packet filter; the kernel
// reports the same from both.
var flavours = []string{"nft", "legacy"}

// newNS makes a network namespace for one test.
func newNS(t *testing.T) *netns.NS {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// command runs a program in ns and returns its output.
func command(t *testing.T, ns *netns.NS, stdin, path string, args ...string) string {
	t.Helper()
	r, err := exec.Run(context.Background(), exec.Spec{
		Path: path, Args: args, Stdin: strings.NewReader(stdin), Netns: ns.Fd(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(r.Stdout)
}

// restore loads rules of both families.
func restore(t *testing.T, ns *netns.NS, flavour, rules4, rules6 string) {
	t.Helper()
	command(t, ns, rules4, "iptables-"+flavour+"-restore")
	if rules6 != "" {
		command(t, ns, rules6, "ip6tables-"+flavour+"-restore")
	}
}

// running is a Source at work.
type running struct {
	*Source
	mu     sync.Mutex
	events []trace.Event
	stop   func()
}

// start runs a Source in ns until the test ends and decodes what it emits.
// each is told of every Frame, if not nil.
func start(t *testing.T, ns *netns.NS, c Config, each func(trace.Frame)) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{Source: New(c)}
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- ns.Do(func() error {
			return r.Run(ctx, func() { close(ready) }, func(f trace.Frame) {
				if each != nil {
					each(f)
				}
				r.mu.Lock()
				defer r.mu.Unlock()
				r.events = r.Decoder().Decode(f, r.events)
			})
		})
	}()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(r.stop)
	select {
	case <-ready:
	case err := <-done:
		done <- nil
		t.Fatalf("Run: %v", err)
	}
	return r
}

func (r *running) len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.events)
}

// eventually waits until ok, or fails the test.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in 10 s: %s", what)
		}
	}
}

// settled waits until n stops growing.
func settled(n func() int) int {
	for last := -1; ; {
		now := n()
		if now == last {
			return now
		}
		last = now
		time.Sleep(150 * time.Millisecond)
	}
}

// talk makes a TCP and a UDP exchange over loopback, and a datagram to a
// closed port, which the kernel answers with an ICMP error.
func talk(t *testing.T, ns *netns.NS, host string) {
	t.Helper()
	err := ns.Do(func() error {
		l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
		if err != nil {
			return err
		}
		defer l.Close()
		go func() {
			if c, err := l.Accept(); err == nil {
				fmt.Fprint(c, "hello")
				c.Close()
			}
		}()
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Read(make([]byte, 16)); err != nil {
			return err
		}
		u, err := net.ListenPacket("udp", net.JoinHostPort(host, "0"))
		if err != nil {
			return err
		}
		d, err := net.Dial("udp", u.LocalAddr().String())
		if err != nil {
			return err
		}
		defer d.Close()
		fmt.Fprint(d, strings.Repeat("ping", 100))
		if _, _, err := u.ReadFrom(make([]byte, 1024)); err != nil {
			return err
		}
		u.Close()
		fmt.Fprint(d, "anybody?")
		if _, err := d.Read(make([]byte, 16)); err == nil {
			return fmt.Errorf("a closed port answered")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

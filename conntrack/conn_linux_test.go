package conntrack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
)

// open makes a network namespace that tracks connections through a DNAT rule,
// and connects to its table.
func open(t *testing.T) (*netns.NS, *Conn) {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	for _, name := range []string{"nf_conntrack_acct", "nf_conntrack_timestamp"} {
		if err := ns.SetSysctl("net.netfilter."+name, "1"); err != nil {
			t.Fatal(err)
		}
	}
	for tool, to := range map[string]string{"iptables-nft-restore": "127.0.0.1", "ip6tables-nft-restore": "[::1]"} {
		_, err := exec.Run(context.Background(), exec.Spec{Path: tool, Netns: ns.Fd(), Stdin: strings.NewReader(fmt.Sprintf(
			"*nat\n-A OUTPUT -p tcp --dport 80 -j DNAT --to-destination %[1]s:8080\n-A OUTPUT -p udp --dport 80 -j DNAT --to-destination %[1]s:8080\nCOMMIT\n", to))})
		if err != nil {
			t.Fatal(err)
		}
	}
	var c *Conn
	if err := ns.Do(func() (err error) { c, err = Open(Config{}); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return ns, c
}

// dial makes an entry per protocol for a Service address, and returns the
// tuples as the clients see them. The connections stay open for the test.
func dial(t *testing.T, ns *netns.NS, host, service string) (tuples []Tuple) {
	t.Helper()
	err := ns.Do(func() error {
		l, err := net.Listen("tcp", net.JoinHostPort(host, "8080"))
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		u, err := net.ListenPacket("udp", net.JoinHostPort(host, "8080"))
		if err != nil {
			return err
		}
		t.Cleanup(func() { u.Close() })
		for network, proto := range map[string]Proto{"tcp": TCP, "udp": UDP} {
			c, err := net.Dial(network, net.JoinHostPort(service, "80"))
			if err != nil {
				return err
			}
			t.Cleanup(func() { c.Close() })
			if _, err := c.Write([]byte("hello")); err != nil {
				return err
			}
			tuples = append(tuples, NewTuple(proto,
				netip.MustParseAddrPort(c.LocalAddr().String()), netip.MustParseAddrPort(c.RemoteAddr().String())))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return tuples
}

func TestConn(t *testing.T) {
	ns, c := open(t)
	tuples := append(dial(t, ns, "127.0.0.1", "127.0.0.10"), dial(t, ns, "::1", "::1")...)
	dumped := map[Tuple]Flow{}
	if err := c.Dump(context.Background(), func(f Flow) error { dumped[f.Orig] = f; return nil }); err != nil {
		t.Fatal(err)
	}
	for _, tuple := range tuples {
		t.Run(tuple.String(), func(t *testing.T) {
			f, err := c.Get(tuple)
			if err != nil {
				t.Fatal(err)
			}
			d := dumped[tuple]
			if d.Orig != f.Orig || d.Reply != f.Reply || d.ID != f.ID || d.State != f.State || d.Out != f.Out || d.Start != f.Start {
				t.Errorf("dumped %+v\n   got %+v", d, f)
			}
			// A datagram has no state and, here, no answer; a connection is up.
			tcp := tuple.Proto() == TCP
			if (f.State == TCPEstablished) != tcp || (f.Status&SeenReply != 0) != tcp {
				t.Errorf("state %v, status %x", f.State, f.Status)
			}
			if f.Status&DstNAT == 0 || f.Reply.Src().Port() != 8080 || f.Out.Packets == 0 || f.Out.Bytes == 0 ||
				f.Timeout <= 0 || time.Since(f.Start) > time.Minute || !f.Stop.IsZero() {
				t.Errorf("got %+v", f)
			}
			back, err := c.Get(f.Reply)
			if err != nil || back.ID != f.ID || back.Orig != f.Orig {
				t.Errorf("by its reply tuple: %+v, %v", back, err)
			}

			other := f
			other.ID++
			if err := c.Delete(other); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("deleting with another id: %v, want fs.ErrNotExist", err)
			}
			if _, err := c.Get(tuple); err != nil {
				t.Errorf("after deleting with another id: %v", err)
			}
			if err := c.Delete(f); err != nil {
				t.Error(err)
			}
			if f, err := c.Get(tuple); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("after deleting: %+v, %v, want fs.ErrNotExist", f, err)
			}
			if err := c.Delete(f); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("deleting twice: %v, want fs.ErrNotExist", err)
			}
		})
	}
}

func TestDumpEnds(t *testing.T) {
	ns, c := open(t)
	dial(t, ns, "127.0.0.1", "127.0.0.10")
	ctx, cancel := context.WithCancel(context.Background())
	n := 0
	err := c.Dump(ctx, func(Flow) error { n++; cancel(); return nil })
	if n != 1 || !errors.Is(err, context.Canceled) {
		t.Errorf("%d entries after cancel, %v", n, err)
	}
	if err := c.Dump(ctx, func(Flow) error { t.Error("called"); return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("with an ended context: %v", err)
	}
	enough := errors.New("enough")
	if err := c.Dump(context.Background(), func(Flow) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("an error of the caller: %v", err)
	}
}

func TestStats(t *testing.T) {
	ns, c := open(t)
	before, err := c.Stats()
	if err != nil {
		t.Fatal(err)
	}
	limit, err := ns.Sysctl("net.netfilter.nf_conntrack_max")
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(before.Limit) != limit || before.Entries != 0 {
		t.Errorf("%+v in an empty namespace, limit %s", before, limit)
	}
	dial(t, ns, "127.0.0.1", "127.0.0.10")
	// A FIN out of nowhere is a packet that fits no entry.
	if err := ns.SetSysctl("net.netfilter.nf_conntrack_tcp_loose", "0"); err != nil {
		t.Fatal(err)
	}
	sendFIN(t, ns)
	after, err := c.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if after.Entries != 2 || after.Invalid == 0 || after.Limit != before.Limit {
		t.Errorf("after two connections and an invalid packet: %+v", after)
	}
}

// sendFIN sends a TCP segment with FIN and ACK of no connection.
func sendFIN(t *testing.T, ns *netns.NS) {
	t.Helper()
	err := ns.Do(func() error {
		c, err := net.Dial("ip4:6", "127.0.0.1")
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte{0x9c, 0x40, 0x23, 0x28, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x11, 0x10, 0, 0, 0, 0, 0})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestConcurrent asks from many goroutines at once.
func TestConcurrent(t *testing.T) {
	ns, c := open(t)
	tuples := dial(t, ns, "127.0.0.1", "127.0.0.10")
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 50 {
				want := tuples[i%len(tuples)]
				if f, err := c.Get(want); err != nil || f.Orig != want {
					t.Errorf("%v, %v", f.Orig, err)
				}
				if _, err := c.Stats(); err != nil {
					t.Error(err)
				}
				if err := c.Dump(context.Background(), func(Flow) error { return nil }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

// TestICMP packs the parts of an echo entry into a Tuple and back.
func TestICMP(t *testing.T) {
	ns, c := open(t)
	err := ns.Do(func() error {
		p, err := net.Dial("ip4:icmp", "127.0.0.1")
		if err != nil {
			return err
		}
		defer p.Close()
		_, err = p.Write([]byte{8, 0, 0xf6, 0xcb, 1, 0x32, 0, 2})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	lo := netip.MustParseAddr("127.0.0.1")
	want := NewTuple(ICMP, netip.AddrPortFrom(lo, 0x132), netip.AddrPortFrom(lo, 8<<8))
	f, err := c.Get(want)
	if err != nil || f.Orig != want || f.Reply.Dst().Port() != 0 {
		t.Errorf("got %+v, %v", f, err)
	}
	if err := c.Delete(f); err != nil {
		t.Error(err)
	}
}

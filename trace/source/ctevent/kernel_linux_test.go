package ctevent

import (
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	ct "github.com/ti-mo/conntrack"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/trace"
)

// record writes what the kernel sent to testdata, for the tests that need none.
var record = flag.Bool("record", false, "record the frames of TestOracle in testdata")

func newNS(t *testing.T) *netns.NS {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

func restore(t *testing.T, ns *netns.NS, tool, rules string) {
	t.Helper()
	_, err := exec.Run(context.Background(), exec.Spec{Path: tool, Stdin: strings.NewReader(rules), Netns: ns.Fd()})
	if err != nil {
		t.Fatal(err)
	}
}

// running is a Source at work.
type running struct {
	*Source
	mu     sync.Mutex
	events []trace.Event
	raw    []byte
	stop   func()
}

// start runs a Source in ns until the test ends and decodes what it emits.
func start(t *testing.T, ns *netns.NS, c Config, keep bool) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{Source: New(c)}
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- ns.Do(func() error {
			return r.Run(ctx, func() { close(ready) }, func(f trace.Frame) {
				r.mu.Lock()
				defer r.mu.Unlock()
				if keep {
					r.raw = append(r.raw, f.Data...)
				}
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

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in 20 s: %s", what)
		}
	}
}

// talk makes one TCP and one UDP exchange with a Service address.
func talk(t *testing.T, ns *netns.NS, host, service string) {
	t.Helper()
	err := ns.Do(func() error {
		l, err := net.Listen("tcp", net.JoinHostPort(host, "8080"))
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
		c, err := net.Dial("tcp", net.JoinHostPort(service, "80"))
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Read(make([]byte, 16)); err != nil {
			return err
		}
		u, err := net.ListenPacket("udp", net.JoinHostPort(host, "8080"))
		if err != nil {
			return err
		}
		defer u.Close()
		d, err := net.Dial("udp", net.JoinHostPort(service, "80"))
		if err != nil {
			return err
		}
		defer d.Close()
		fmt.Fprint(d, "ping")
		_, from, err := u.ReadFrom(make([]byte, 16))
		if err != nil {
			return err
		}
		if _, err := u.WriteTo([]byte("pong"), from); err != nil {
			return err
		}
		_, err = d.Read(make([]byte, 16))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// flush removes all entries, which gives each its DESTROY.
func flush(t *testing.T, ns *netns.NS) {
	t.Helper()
	err := ns.Do(func() error {
		c, err := ct.Dial(nil)
		if err != nil {
			return err
		}
		defer c.Close()
		return c.Flush()
	})
	if err != nil {
		t.Fatal(err)
	}
}

func dnat(from, to string) string {
	return fmt.Sprintf(`*nat
-A OUTPUT -p tcp -d %[1]s --dport 80 -j DNAT --to-destination %[2]s:8080
-A OUTPUT -p udp -d %[1]s --dport 80 -j DNAT --to-destination %[2]s:8080
COMMIT
*mangle
-A OUTPUT -j CONNMARK --set-mark 0xa20000
COMMIT
`, from, to)
}

// TestOracle holds our decoder against ti-mo's on the very same messages of a
// real kernel: every field that both know must agree.
func TestOracle(t *testing.T) {
	for _, flavour := range []string{"nft", "legacy"} {
		t.Run(flavour, func(t *testing.T) {
			ns := newNS(t)
			for _, name := range []string{"nf_conntrack_acct", "nf_conntrack_timestamp"} {
				if err := ns.SetSysctl("net.netfilter."+name, "1"); err != nil {
					t.Fatal(err)
				}
			}
			r := start(t, ns, Config{}, true)
			restore(t, ns, "iptables-"+flavour+"-restore", dnat("127.0.0.10", "127.0.0.1"))
			restore(t, ns, "ip6tables-"+flavour+"-restore", dnat("::1", "[::1]"))
			talk(t, ns, "127.0.0.1", "127.0.0.10")
			talk(t, ns, "::1", "::1")
			// No Service has such an entry.
			ping(t, ns)
			eventually(t, "four NEW events", func() bool { return r.len() >= 4 })
			flush(t, ns)
			eventually(t, "four DESTROY events", func() bool { return r.len() >= 8 })
			r.stop()
			agree(t, r)
			if st := r.Stats(); st.Events != 10 || st.Foreign != 2 || st.Damaged != 0 || st.Lost != 0 || st.Overruns != 0 {
				t.Errorf("stats %+v, want 10 events of which 2 foreign", st)
			}
			if *record {
				if err := os.WriteFile("testdata/"+flavour+".frame", r.raw, 0o644); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// ping sends an ICMP echo request to ourselves, which gives an entry.
func ping(t *testing.T, ns *netns.NS) {
	t.Helper()
	err := ns.Do(func() error {
		c, err := net.Dial("ip4:icmp", "127.0.0.1")
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte{8, 0, 0xf7, 0xfd, 0, 1, 0, 1})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// agree compares r's events with what ti-mo makes of the raw messages.
func agree(t *testing.T, r *running) {
	t.Helper()
	i := 0
	for b := r.raw; len(b) > 0; {
		n := int(binary.NativeEndian.Uint32(b))
		var m netlink.Message
		if err := m.UnmarshalBinary(b[:n]); err != nil {
			t.Fatal(err)
		}
		b = b[(n+3)&^3:]
		var theirs ct.Event
		if err := theirs.Unmarshal(m); err != nil {
			t.Fatalf("ti-mo: %v", err)
		}
		if p := theirs.Flow.TupleOrig.Proto.Protocol; p != 6 && p != 17 {
			continue
		}
		if i == len(r.events) {
			t.Fatalf("ti-mo sees more than our %d events", i)
		}
		same(t, &theirs, r.events[i])
		i++
	}
	if i != len(r.events) {
		t.Errorf("ti-mo sees %d events, we %d", i, len(r.events))
	}
}

func same(t *testing.T, theirs *ct.Event, e trace.Event) {
	t.Helper()
	kind := trace.KindNew
	if theirs.Type == ct.EventDestroy {
		kind = trace.KindDestroy
	}
	f := theirs.Flow
	want := trace.Event{
		Kind: kind, Source: trace.Conntrack, Time: e.Time, KernelTime: e.KernelTime,
		Tuple: theirTuple(f.TupleOrig), Reply: theirTuple(f.TupleReply),
		CTID: f.ID, Status: conntrack.Status(f.Status.Value), Timeout: f.Timeout, Mark: f.Mark,
		Out:   conntrack.Counters{Packets: f.CountersOrig.Packets, Bytes: f.CountersOrig.Bytes},
		In:    conntrack.Counters{Packets: f.CountersReply.Packets, Bytes: f.CountersReply.Bytes},
		Start: nanos(f.Timestamp.Start), Stop: nanos(f.Timestamp.Stop),
	}
	if f.ProtoInfo.TCP != nil {
		want.TCPState = conntrack.TCPState(f.ProtoInfo.TCP.State)
	}
	if e != want {
		t.Errorf("ti-mo says %+v\n      we say %+v", want, e)
	}
	switch {
	case e.Status&conntrack.DstNAT == 0 || e.Mark != 0xa20000 || e.CTID == 0 || e.Reply.Src().Port() != 8080 || e.Tuple.Dst().Port() != 80:
		t.Errorf("%v: not the connection that was made: %+v", e.Kind, e)
	case e.Kind == trace.KindDestroy && (e.Out.Packets == 0 || e.In.Bytes == 0 || e.Start == 0 || e.Stop < e.Start):
		t.Errorf("DESTROY without figures: %+v", e)
	case !e.KernelTime && timestampEvent(t), time.Since(time.Unix(0, e.Time)).Abs() > time.Minute:
		t.Errorf("%v: time %v, the kernel's %v", e.Kind, time.Unix(0, e.Time), e.KernelTime)
	}
}

// timestampEvent says whether this kernel stamps events (Linux 6.14).
func timestampEvent(t *testing.T) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/sys/kernel/osrelease")
	var major, minor int
	if _, scanErr := fmt.Sscanf(string(b), "%d.%d", &major, &minor); err != nil || scanErr != nil {
		t.Fatal(err, scanErr)
	}
	return major > 6 || major == 6 && minor >= 14
}

func theirTuple(k ct.Tuple) conntrack.Tuple {
	src, dst := k.IP.SourceAddress.As16(), k.IP.DestinationAddress.As16()
	return conntrack.TupleOf6(conntrack.Proto(k.Proto.Protocol), src[:], dst[:], k.Proto.SourcePort, k.Proto.DestinationPort)
}

// TestEntry makes the Event of a dumped entry and compares it with the NEW
// event of the same.
func TestEntry(t *testing.T) {
	ns := newNS(t)
	r := start(t, ns, Config{}, false)
	restore(t, ns, "iptables-nft-restore", dnat("127.0.0.10", "127.0.0.1"))
	talk(t, ns, "127.0.0.1", "127.0.0.10")
	eventually(t, "two NEW events", func() bool { return r.len() >= 2 })
	var c *conntrack.Conn
	err := ns.Do(func() (err error) { c, err = conntrack.Open(conntrack.Config{}); return err })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	at := time.Now()
	for _, e := range r.events {
		f, err := c.Get(e.Tuple)
		if err != nil {
			t.Fatal(err)
		}
		got := Entry(f, at)
		if got.Kind != trace.KindEntry || got.Tuple != e.Tuple || got.Reply != e.Reply || got.CTID != e.CTID ||
			got.Time != at.UnixNano() || got.Mark != e.Mark || got.Status&conntrack.SeenReply == 0 || got.Timeout == 0 {
			t.Errorf("entry %+v\nof event %+v", got, e)
		}
	}
}

// TestBurst makes more flows than a user's socket buffer may hold: each event
// is read or counted as lost, and as root none is lost.
func TestBurst(t *testing.T) {
	const flows = 20_000
	// Even where the buffer stops at rmem_max it holds a tick's worth; a
	// small one shows that the count of losses is exact.
	for _, tt := range []struct {
		name   string
		buffer int
		tick   time.Duration
	}{{"default", 0, 0}, {"overrun", 64 << 10, 50 * time.Millisecond}} {
		t.Run(tt.name, func(t *testing.T) {
			ns := newNS(t)
			var mu sync.Mutex
			var told uint64
			r := start(t, ns, Config{ReceiveBuffer: tt.buffer, Tick: tt.tick, OnLoss: func(l trace.Loss) {
				mu.Lock()
				defer mu.Unlock()
				told += l.Events
			}}, false)
			restore(t, ns, "iptables-nft-restore", "*filter\n-A OUTPUT -p udp -j ACCEPT\n-A OUTPUT -m conntrack --ctstate NEW -j ACCEPT\nCOMMIT\n")
			begin := time.Now()
			shoot(t, ns, flows)
			took := time.Since(begin)
			eventually(t, "all NEW events are read or lost", func() bool {
				st := r.Stats()
				return st.Events+st.Lost >= flows
			})
			flush(t, ns)
			eventually(t, "all DESTROY events are read or lost", func() bool {
				st := r.Stats()
				return st.Events+st.Lost >= 2*flows
			})
			r.stop()
			st := r.Stats()
			t.Logf("%d flows in %v (%.0f/s): %+v", flows, took, flows/took.Seconds(), st)
			if st.Events+st.Lost != 2*flows || uint64(len(r.events)) != st.Events || told != st.Lost {
				t.Errorf("%d read and %d lost (%d told) of %d", len(r.events), st.Lost, told, 2*flows)
			}
			switch {
			case tt.buffer != 0 && (st.Lost == 0 || st.Overruns == 0):
				t.Error("nothing lost in a tiny buffer")
			case tt.buffer == 0 && st.ReceiveBuffer >= 32<<20 && st.Lost != 0:
				t.Errorf("lost %d with the whole buffer", st.Lost)
			case tt.buffer == 0 && (st.Note == "") != (st.ReceiveBuffer >= 32<<20):
				t.Errorf("buffer %d, note %q", st.ReceiveBuffer, st.Note)
			}
		})
	}
}

// shoot sends one datagram from each of n source addresses and ports.
func shoot(t *testing.T, ns *netns.NS, n int) {
	t.Helper()
	err := ns.Do(func() error {
		sink, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9})
		if err != nil {
			return err
		}
		defer sink.Close()
		per := 100
		for i := 0; i < n; i += per {
			from := &net.UDPAddr{IP: net.IPv4(127, 1, byte(i/per>>8), byte(i/per))}
			for j := range per {
				from.Port = 20_000 + j
				c, err := net.DialUDP("udp4", from, sink.LocalAddr().(*net.UDPAddr))
				if err != nil {
					return err
				}
				_, err = c.Write([]byte("x"))
				c.Close()
				if err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

package nflog

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/trace"
)

// TestBurst reports every packet of a flood: each is read or counted as lost,
// and as root none is lost. The truth is the rule's own packet counter.
func TestBurst(t *testing.T) {
	const packets = 40_000
	for _, tt := range []struct {
		name   string
		buffer int
		tick   time.Duration
	}{{"default", 0, 0}, {"overrun", 64 << 10, 50 * time.Millisecond}} {
		for _, flavour := range flavours {
			t.Run(tt.name+"/"+flavour, func(t *testing.T) {
				ns := newNS(t)
				var mu sync.Mutex
				var told uint64
				r := start(t, ns, Config{ReceiveBuffer: tt.buffer, Tick: tt.tick, OnLoss: func(l trace.Loss) {
					mu.Lock()
					defer mu.Unlock()
					told += l.Events
				}}, nil)
				restore(t, ns, flavour, "*raw\n-A OUTPUT -p udp -j NFLOG --nflog-group 100 --nflog-prefix kp1:reply:X\nCOMMIT\n", "")
				begin := time.Now()
				flood(t, ns, packets)
				took := time.Since(begin)
				settled(r.len)
				// Losses at the end show with the next event.
				flood(t, ns, 1)
				settled(r.len)
				r.stop()
				st, sent := r.Stats(), counted(t, ns, flavour)
				t.Logf("%d packets in %v (%.0f/s): %+v", sent, took, packets/took.Seconds(), st)
				if st.Events+st.Lost != sent || uint64(len(r.events)) != st.Events || told != st.Lost || sent < packets {
					t.Errorf("%d read and %d lost (%d told) of %d", len(r.events), st.Lost, told, sent)
				}
				switch {
				case tt.buffer != 0 && (st.Lost == 0 || st.Overruns == 0):
					t.Error("nothing lost in a tiny buffer")
				case tt.buffer == 0 && st.ReceiveBuffer >= 16<<20 && st.Lost != 0:
					t.Errorf("lost %d with the whole buffer", st.Lost)
				}
			})
		}
	}
}

// counted reads the packet counter of the only NFLOG rule.
func counted(t *testing.T, ns *netns.NS, flavour string) uint64 {
	t.Helper()
	out := command(t, ns, "", "iptables-"+flavour+"-save", "-c", "-t", "raw")
	m := regexp.MustCompile(`(?m)^\[(\d+):\d+\] -A OUTPUT .*NFLOG`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no rule in:\n%s", out)
	}
	n, err := strconv.ParseUint(m[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// flood sends n datagrams over loopback.
func flood(t *testing.T, ns *netns.NS, n int) {
	t.Helper()
	err := ns.Do(func() error {
		sink, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return err
		}
		defer sink.Close()
		c, err := net.Dial("udp4", sink.LocalAddr().String())
		if err != nil {
			return err
		}
		defer c.Close()
		for range n {
			if _, err := c.Write([]byte("x")); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestHeld binds a group that is taken: by Source, by Tap and by Probe.
func TestHeld(t *testing.T) {
	ns := newNS(t)
	start(t, ns, Config{Group: 7}, nil)
	for name, bind := range map[string]func() error{
		"Source": func() error {
			return New(Config{Group: 7}).Run(context.Background(), func() {}, func(trace.Frame) {})
		},
		"Tap":   func() error { return Tap(context.Background(), TapConfig{Group: 7}, func() {}, func(TapPacket) {}) },
		"Probe": func() error { return Probe(context.Background(), 7) },
	} {
		err := ns.Do(bind)
		var held *HeldError
		if !errors.As(err, &held) {
			t.Errorf("%s: %v, want a HeldError", name, err)
			continue
		}
		if held.PID != os.Getpid() || held.Group != 7 || held.Command == "" {
			t.Errorf("%s: %+v, want ourselves, %d", name, held, os.Getpid())
		}
		if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EBUSY) {
			t.Errorf("%s: %v has no errno", name, err)
		}
		want := fmt.Sprintf("nflog: group 7 is held by %s (pid %d): choose another group", held.Command, os.Getpid())
		if err.Error() != want {
			t.Errorf("%s says %q, want %q", name, err, want)
		}
	}
}

// TestProbe tries a free group and finds it free again.
func TestProbe(t *testing.T) {
	ns := newNS(t)
	for range 2 {
		if err := ns.Do(func() error { return Probe(context.Background(), 9) }); err != nil {
			t.Error(err)
		}
	}
	start(t, ns, Config{Group: 9}, nil)
}

// TestRunEnds wants a cancelled Run to end at once and to leave nothing bound.
func TestRunEnds(t *testing.T) {
	ns := newNS(t)
	for range 3 {
		r := start(t, ns, Config{Group: 8}, nil)
		begin := time.Now()
		r.stop()
		if d := time.Since(begin); d > 500*time.Millisecond {
			t.Errorf("Run took %v to end", d)
		}
	}
}

package nflog

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/trace"
)

// record writes what the kernel sent to testdata, for the tests that need none.
var record = flag.Bool("record", false, "record the frames of TestOracle in testdata")

// twice is a ruleset that reports every packet of two hooks to two groups.
func twice(icmp string) string {
	var b strings.Builder
	b.WriteString("*mangle\n-A OUTPUT -p tcp -j MARK --set-mark 0x4000\n")
	for _, rule := range []string{
		"OUTPUT -p tcp -j NFLOG --nflog-prefix kp1:pick:ABCDEFGHIJKLMNOP",
		"OUTPUT -p udp -j NFLOG --nflog-prefix kp1:miss:X",
		"INPUT -p tcp -j NFLOG --nflog-prefix kp1:synack",
		"INPUT -p " + icmp + " -j NFLOG --nflog-prefix kp1:icmp",
		"POSTROUTING -p udp -j NFLOG --nflog-prefix somebody-else",
	} {
		fmt.Fprintf(&b, "-A %s --nflog-group 100\n-A %s --nflog-group 101\n", rule, rule)
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

// tap runs Tap in ns until the test ends.
func tap(t *testing.T, ns *netns.NS, c TapConfig) (packets func() []TapPacket) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var mu sync.Mutex
	var got []TapPacket
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() {
		done <- ns.Do(func() error {
			return Tap(ctx, c, func() { close(ready) }, func(p TapPacket) {
				mu.Lock()
				defer mu.Unlock()
				got = append(got, p)
			})
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Tap: %v", err)
		}
	})
	select {
	case <-ready:
	case err := <-done:
		done <- nil
		t.Fatalf("Tap: %v", err)
	}
	return func() []TapPacket {
		mu.Lock()
		defer mu.Unlock()
		return got
	}
}

// TestOracle holds our receiving and decoding against go-nflog's: the same
// packets, reported to two groups, must read the same, attribute by attribute.
func TestOracle(t *testing.T) {
	for _, flavour := range flavours {
		t.Run(flavour, func(t *testing.T) {
			ns := newNS(t)
			theirs := tap(t, ns, TapConfig{Group: 101, CopyRange: 128})
			var mu sync.Mutex
			var ours []TapPacket
			var raw []byte
			r := start(t, ns, Config{Group: 100}, func(f trace.Frame) {
				mu.Lock()
				defer mu.Unlock()
				raw = append(raw, f.Data...)
				ours = append(ours, reports(t, f.Data)...)
			})
			restore(t, ns, flavour, twice("icmp"), twice("icmpv6 --icmpv6-type destination-unreachable"))
			talk(t, ns, "127.0.0.1")
			talk(t, ns, "::1")
			count := func() int { mu.Lock(); defer mu.Unlock(); return len(ours) }
			n := settled(count)
			eventually(t, "go-nflog has read as many", func() bool { return len(theirs()) >= n })
			mu.Lock()
			defer mu.Unlock()
			want := theirs()
			for i := range want {
				// Neither is part of an Event.
				want[i].UID, want[i].Local = 0, false
			}
			// The kernel looks at its clock for each report of a packet anew.
			near := cmp.Comparer(func(a, b time.Time) bool {
				return a.IsZero() == b.IsZero() && a.Sub(b).Abs() < 50*time.Millisecond
			})
			if diff := cmp.Diff(want, ours, near); diff != "" {
				t.Fatalf("go-nflog (-) and we (+) disagree:\n%s", diff)
			}
			if n < 30 {
				t.Errorf("only %d reports", n)
			}
			for _, p := range ours {
				conform(t, p.Payload, p.Prefix == "kp1:icmp")
			}
			if *record {
				if err := os.WriteFile("testdata/"+flavour+".frame", raw, 0o644); err != nil {
					t.Error(err)
				}
			}
			r.stop()
			check(t, r, n)
		})
	}
}

// reports reads Data like a Decoder would, in go-nflog's terms.
func reports(t *testing.T, data []byte) (packets []TapPacket) {
	for m := nfnl.NewMessages(data); m.Next(); {
		var r report
		if !r.read(m.Attrs()) {
			t.Error("a report of the kernel does not parse")
		}
		p := TapPacket{
			Prefix: string(r.prefix), Payload: bytes.Clone(r.payload), Hook: r.hook, Mark: r.mark,
			InDev: r.inDev, OutDev: r.outDev, PhysIn: r.physIn, PhysOut: r.physOut,
		}
		if r.time != 0 {
			p.Time = time.Unix(0, r.time)
		}
		for a := m.Attrs(); a.Next(); {
			if a.Type == attrSeq {
				p.Seq = a.Uint32()
			}
		}
		packets = append(packets, p)
	}
	return packets
}

// check looks at what the Decoder made of talk in both families.
func check(t *testing.T, r *running, reports int) {
	t.Helper()
	st := r.Stats()
	if st.Lost != 0 || st.Damaged != 0 || st.Overruns != 0 || st.Events != uint64(reports) || st.Foreign == 0 ||
		st.Foreign+uint64(len(r.events)) != st.Events {
		t.Errorf("%d events decoded of %+v", len(r.events), st)
	}
	kinds := map[trace.EventKind]int{}
	for i := range r.events {
		e := &r.events[i]
		kinds[e.Kind]++
		if stamped := e.Hook <= 2; e.KernelTime != stamped {
			t.Errorf("hook %d: kernel time %v", e.Hook, e.KernelTime)
		}
		if i > 0 && e.Time < r.events[i-1].Time-int64(1e6) {
			t.Errorf("event %d (%v) is %d ns before the one before it", i, e.Kind, r.events[i-1].Time-e.Time)
		}
		switch e.Kind {
		case trace.KindPick:
			if e.Mark != 0x4000 || e.OutDev != 1 || e.Tuple.Proto().String() != "tcp" || e.TCPSeq == 0 {
				t.Errorf("pick: %+v", e)
			}
		case trace.KindICMP:
			if e.Tuple.Proto().String() != "udp" || e.ICMPFrom == [16]byte{} || e.ICMPType == 0 {
				t.Errorf("icmp: %v from %v type %d", e.Tuple, e.ICMPFrom, e.ICMPType)
			}
		}
	}
	for _, k := range []trace.EventKind{trace.KindPick, trace.KindMiss, trace.KindSynAck, trace.KindICMP} {
		if kinds[k] < 2 {
			t.Errorf("%d events of kind %v, want some of both families", kinds[k], k)
		}
	}
}

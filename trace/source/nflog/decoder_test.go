package nflog

import (
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// message makes a report as the kernel would.
func message(prefix string, seq uint32, at time.Time, payload []byte) []byte {
	be := binary.BigEndian
	a := nfnl.AppendAttr(nil, attrPacketHdr, 8, 0, 2, 0)
	a = nfnl.AppendAttr(a, attrPrefix, append([]byte(prefix), 0)...)
	a = nfnl.AppendAttr(a, attrInDev, be.AppendUint32(nil, 7)...)
	a = nfnl.AppendAttr(a, attrMark, be.AppendUint32(nil, 0x4000)...)
	if !at.IsZero() {
		a = nfnl.AppendAttr(a, attrTimestamp,
			be.AppendUint64(be.AppendUint64(nil, uint64(at.Unix())), uint64(at.Nanosecond()/1000))...)
	}
	a = nfnl.AppendAttr(a, attrSeq, be.AppendUint32(nil, seq)...)
	a = nfnl.AppendAttr(a, attrPayload, payload...)
	return nfnl.AppendMessage(nil, typePacket, 0, 0, nfnl.FamilyIPv4, 0, a)
}

var testRule = &proxy.Rule{Tag: proxy.Tag{Kind: proxy.TagPick, ID: "SXIVWICOYRO3J4NJ"}}

func index() proxy.Index {
	x := proxy.Index{}
	if err := x.Add(testRule); err != nil {
		panic(err)
	}
	return x
}

func TestDecode(t *testing.T) {
	g := generator{rand.New(rand.NewPCG(7, 8))}
	now := time.Now().Truncate(time.Microsecond)
	stamp := now.Add(-3 * time.Millisecond)
	var data []byte
	data = append(data, message("kp1:pick:SXIVWICOYRO3J4NJ", 0, time.Time{}, g.packet())...)
	data = append(data, message("kp1:pick:UNKNOWN", 1, stamp, g.packet())...)
	data = append(data, message("kp1:icmp", 2, time.Time{}, g.icmp())...)
	data = append(data, message("kp1:icmp", 3, stamp, g.packet())...) // no ICMP error
	data = append(data, message("kp1:nonsense:X", 4, stamp, g.packet())...)
	data = append(data, message("TRACE: raw:PREROUTING:rule:1 ", 5, stamp, g.packet())...)
	data = append(data, message("", 6, stamp, g.packet())...)
	data = append(data, message("kp1:fin", 7, stamp, []byte{0x45})...)
	data = append(data, 1, 2, 3)

	d := NewDecoder(index().Lookup)
	events := d.Decode(trace.Frame{Time: now.UnixNano(), Data: data}, nil)
	if len(events) != 3 {
		t.Fatalf("%d events, want 3", len(events))
	}
	for i, want := range []struct {
		kind       trace.EventKind
		rule       *proxy.Rule
		kernelTime bool
	}{
		{trace.KindPick, testRule, false}, {trace.KindPick, nil, true}, {trace.KindICMP, nil, false},
	} {
		e := events[i]
		if e.Kind != want.kind || e.Rule != want.rule || e.KernelTime != want.kernelTime ||
			e.Time != stamp.UnixNano() || e.Mark != 0x4000 || e.InDev != 7 || e.Hook != 2 || e.Tuple.IsZero() {
			t.Errorf("event %d: %+v", i, e)
		}
	}
	if st := d.Stats(); st.Events != 3 || st.Foreign != 3 || st.Damaged != 3 {
		t.Errorf("stats %+v, want 3 events, 3 foreign, 3 damaged", st)
	}
}

func TestStampsNobodyCanExplain(t *testing.T) {
	g := generator{rand.New(rand.NewPCG(9, 9))}
	now := time.Now()
	data := message("kp1:syn", 0, time.Time{}, g.packet())
	data = append(data, message("kp1:syn", 1, time.Unix(55, 0), g.packet())...)
	events := NewDecoder(nil).Decode(trace.Frame{Time: now.UnixNano(), Data: data}, nil)
	if len(events) != 2 || events[0].Time != now.UnixNano() || events[1].Time != time.Unix(55, 0).UnixNano() {
		t.Errorf("got %+v", events)
	}
}

// corpus returns Frames: recorded ones and one that we made.
func corpus(t testing.TB) [][]byte {
	names, err := filepath.Glob("testdata/*.frame")
	if err != nil || len(names) < 2 {
		t.Fatalf("recorded frames missing: %v, %v", names, err)
	}
	var frames [][]byte
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		frames = append(frames, b)
	}
	g := generator{rand.New(rand.NewPCG(1, 1))}
	var made []byte
	for i := range uint32(32) {
		kind := proxy.TagKind(1 + i%uint32(proxy.TagReply))
		payload := g.packet()
		if kind == proxy.TagICMP {
			payload = g.icmp()
		}
		made = append(made, message(proxy.Tag{Kind: kind, ID: "SXIVWICOYRO3J4NJ"}.String(), i, time.Now(), payload[:min(len(payload), 128)])...)
	}
	return append(frames, made)
}

func TestDecodeDoesNotAllocate(t *testing.T) {
	x := index()
	for i, data := range corpus(t) {
		d := NewDecoder(x.Lookup)
		into := make([]trace.Event, 0, 4096)
		f := trace.Frame{Time: time.Now().UnixNano(), Data: data}
		d.Decode(f, into) // remembers the tags no index knows
		if n := testing.AllocsPerRun(100, func() { into = d.Decode(f, into[:0]) }); n != 0 {
			t.Errorf("frame %d: %v allocations for %d events", i, n, len(into))
		}
		if len(into) == 0 {
			t.Errorf("frame %d: no events", i)
		}
	}
}

// TestRecorded decodes what a real kernel sent, and holds its packets against
// gopacket.
func TestRecorded(t *testing.T) {
	understood := 0
	for _, data := range corpus(t) {
		for m := nfnl.NewMessages(data); m.Next(); {
			var r report
			if m.Type != typePacket || !r.read(m.Attrs()) {
				t.Fatal("a recorded message does not parse")
			}
			if conform(t, r.payload, string(r.prefix) == "kp1:icmp") {
				understood++
			}
		}
	}
	if understood < 50 {
		t.Errorf("only %d packets compared", understood)
	}
}

func FuzzDecode(f *testing.F) {
	for _, data := range corpus(f) {
		f.Add(data)
	}
	x := index()
	f.Fuzz(func(t *testing.T, data []byte) {
		c := counter{report: func(_, _ int64, _ uint64) {}}
		n := c.frame(data, 1)
		d := NewDecoder(x.Lookup)
		events := d.Decode(trace.Frame{Data: data}, nil)
		if st := d.Stats(); st.Events != uint64(len(events)) || st.Events+st.Foreign > n {
			t.Errorf("%d events decoded of %d read: %+v", len(events), n, st)
		}
		again := NewDecoder(x.Lookup).Decode(trace.Frame{Data: data}, nil)
		for i := range events {
			if events[i].Kind == trace.KindNone || events[i].Tuple.IsZero() && events[i].Kind != trace.KindICMP {
				t.Errorf("an event of nothing: %+v", events[i])
			}
			if events[i] != again[i] {
				t.Errorf("decoding twice differs: %+v, %+v", events[i], again[i])
			}
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	frames := corpus(b)
	data := frames[len(frames)-1]
	d := NewDecoder(index().Lookup)
	f := trace.Frame{Time: time.Now().UnixNano(), Data: data}
	into := d.Decode(f, nil)
	b.ReportAllocs()
	for b.Loop() {
		into = d.Decode(f, into[:0])
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(into)), "ns/event")
}

func BenchmarkCount(b *testing.B) {
	frames := corpus(b)
	c := counter{report: func(_, _ int64, _ uint64) {}}
	data := frames[len(frames)-1]
	b.ReportAllocs()
	var n uint64
	for b.Loop() {
		n += c.frame(data, 1)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/event")
}

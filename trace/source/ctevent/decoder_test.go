package ctevent

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// corpus returns recorded Frames of both flavours.
func corpus(t testing.TB) [][]byte {
	names, err := filepath.Glob("testdata/*.frame")
	if err != nil || len(names) != 2 {
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
	return frames
}

func TestRecorded(t *testing.T) {
	for _, data := range corpus(t) {
		d := NewDecoder()
		events := d.Decode(trace.Frame{Time: 1, Data: data}, nil)
		if st := d.Stats(); len(events) != 8 || st.Events != 8 || st.Foreign != 2 || st.Damaged != 0 {
			t.Fatalf("%d events, stats %+v", len(events), st)
		}
		families := map[bool]int{}
		for _, e := range events {
			families[e.Tuple.Is4()]++
			if !e.KernelTime || e.Time < e.Start || e.CTID == 0 || e.Status&conntrack.DstNAT == 0 {
				t.Errorf("event %+v", e)
			}
		}
		if families[true] != 4 || families[false] != 4 {
			t.Errorf("events by family (IPv4: true): %v", families)
		}
	}
}

// TestOthers decodes what is not ours or not whole.
func TestOthers(t *testing.T) {
	data := corpus(t)[0]
	update := append([]byte{}, data...)
	update[7] = 0 // no CREATE flag: an update
	d := NewDecoder()
	if events := d.Decode(trace.Frame{Data: update}, nil); len(events) != 7 || d.Stats().Foreign != 3 {
		t.Errorf("with an update: %d events, %+v", len(events), d.Stats())
	}
	gre := append([]byte{}, data...)
	for i := range gre {
		if i+5 <= len(gre) && gre[i] == 5 && gre[i+1] == 0 && gre[i+2] == ctaProtoNum && gre[i+3] == 0 && gre[i+4] == 6 {
			gre[i+4] = 47
		}
	}
	d = NewDecoder()
	if events := d.Decode(trace.Frame{Data: gre}, nil); len(events) != 4 || d.Stats().Foreign != 6 || d.Stats().Damaged != 0 {
		t.Errorf("with GRE for TCP: %d events, %+v", len(events), d.Stats())
	}
	d = NewDecoder()
	if events := d.Decode(trace.Frame{Data: data[:len(data)-8]}, nil); uint64(len(events))+d.Stats().Foreign != 9 || d.Stats().Damaged != 1 {
		t.Errorf("cut off: %d events, %+v", len(events), d.Stats())
	}
}

func TestDecodeDoesNotAllocate(t *testing.T) {
	for _, data := range corpus(t) {
		d := NewDecoder()
		into := make([]trace.Event, 0, 64)
		if n := testing.AllocsPerRun(100, func() { into = d.Decode(trace.Frame{Data: data}, into[:0]) }); n != 0 {
			t.Errorf("%v allocations for %d events", n, len(into))
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, data := range corpus(f) {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		d := NewDecoder()
		events := d.Decode(trace.Frame{Data: data}, nil)
		if st := d.Stats(); st.Events != uint64(len(events)) {
			t.Errorf("%d events, stats %+v", len(events), st)
		}
		again := NewDecoder().Decode(trace.Frame{Data: data}, nil)
		for i, e := range events {
			if e.Tuple.IsZero() || e.Reply.IsZero() || e.Kind != trace.KindNew && e.Kind != trace.KindDestroy {
				t.Errorf("an event of nothing: %+v", e)
			}
			if e != again[i] {
				t.Errorf("decoding twice differs: %+v, %+v", e, again[i])
			}
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	data := corpus(b)[0]
	d := NewDecoder()
	into := d.Decode(trace.Frame{Data: data}, nil)
	b.ReportAllocs()
	for b.Loop() {
		into = d.Decode(trace.Frame{Data: data}, into[:0])
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(into)), "ns/event")
}

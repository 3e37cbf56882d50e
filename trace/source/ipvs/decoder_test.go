package ipvs

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDecodeServers(t *testing.T) {
	d := NewDecoder()
	got := d.Decode(trace.Frame{Time: 7, Data: read(t, "ip_vs")}, nil)
	vip, vip6 := ap("10.96.0.10:80"), ap("[2001:db8::a]:80")
	want := []trace.Event{
		{Tuple: conntrack.NewTuple(conntrack.TCP, ap("10.1.0.2:8080"), vip), IPVS: trace.IPVSSample{Active: 5, Inactive: 3, Weight: 1, Method: trace.ForwardNAT}},
		{Tuple: conntrack.NewTuple(conntrack.TCP, ap("10.1.0.3:8080"), vip), IPVS: trace.IPVSSample{Active: 2, Weight: 2, Method: trace.ForwardDirect}},
		{Tuple: conntrack.NewTuple(conntrack.UDP, ap("10.1.0.4:53"), ap("10.96.0.53:53")), IPVS: trace.IPVSSample{Inactive: 9, Method: trace.ForwardTunnel}},
		{Tuple: conntrack.NewTuple(conntrack.TCP, ap("[2001:db8:1::2]:8080"), vip6), IPVS: trace.IPVSSample{Weight: 1, Method: trace.ForwardLocal}},
	}
	if len(got) != len(want) {
		t.Fatalf("%d events, want %d: %+v", len(got), len(want), got)
	}
	for i, w := range want {
		w.Kind, w.Source, w.Time = trace.KindServer, trace.IPVS, 7
		if got[i] != w {
			t.Errorf("%d: %+v, want %+v", i, got[i], w)
		}
	}
	if st := d.Stats(); st != (DecoderStats{Events: 4, Foreign: 1}) {
		t.Errorf("stats %+v", st)
	}
}

func TestDecodeConnections(t *testing.T) {
	d := NewDecoder()
	got := d.Decode(trace.Frame{Time: 7, Data: read(t, "ip_vs_conn")}, nil)
	vip, pod, client := ap("10.96.0.10:80"), ap("10.1.0.3:8080"), ap("10.9.0.2:38848")
	state := func(word string) trace.IPVSState { return trace.ParseIPVSState([]byte(word)) }
	entry := func(kind trace.EventKind, client netip.AddrPort, word string, left uint32) trace.Event {
		return trace.Event{Kind: kind, Source: trace.IPVS, Time: 7, Tuple: conntrack.NewTuple(conntrack.TCP, client, vip),
			Reply: conntrack.NewTuple(conntrack.TCP, pod, client), IPVS: trace.IPVSSample{Left: left, State: state(word)}}
	}
	want := []trace.Event{
		entry(trace.KindState, client, "TIME_WAIT", 112),
		entry(trace.KindTemplate, netip.AddrPortFrom(client.Addr(), 0), "ASSURED", 57),
	}
	c6 := ap("[2001:db8:9::2]:1")
	want = append(want, trace.Event{Kind: trace.KindState, Source: trace.IPVS, Time: 7,
		Tuple: conntrack.NewTuple(conntrack.SCTP, c6, ap("[2001:db8::a]:80")), Reply: conntrack.NewTuple(conntrack.SCTP, ap("[2001:db8:1::2]:8080"), c6),
		IPVS: trace.IPVSSample{Left: 5, State: state("ESTABLISHED")}})
	if len(got) != len(want) {
		t.Fatalf("%d events, want %d: %+v", len(got), len(want), got)
	}
	for i := range want {
		if got[i] != want[i] || got[i].IPVS.State == 0 {
			t.Errorf("%d: %+v, want %+v", i, got[i], want[i])
		}
	}
	// The last line was cut off by the bounded read.
	if st := d.Stats(); st != (DecoderStats{Events: 3, Damaged: 1}) {
		t.Errorf("stats %+v", st)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(read(f, "ip_vs"))
	f.Add(read(f, "ip_vs_conn"))
	f.Fuzz(func(t *testing.T, data []byte) {
		d := NewDecoder()
		events := d.Decode(trace.Frame{Data: data}, nil)
		if st := d.Stats(); st.Events != uint64(len(events)) {
			t.Errorf("%d events, stats %+v", len(events), st)
		}
		again := NewDecoder().Decode(trace.Frame{Data: data}, nil)
		for i := range events {
			if events[i].Tuple.IsZero() || events[i] != again[i] {
				t.Errorf("%d: %+v, then %+v", i, events[i], again[i])
			}
		}
	})
}

// Counters of 32 bits wrap, and a server made anew begins at zero.
func TestCounter(t *testing.T) {
	var c counter
	for _, step := range []struct{ conns, bytes, want, wantBytes uint64 }{
		{4294967290, 100, 4294967290, 100},
		{4, 200, 4294967300, 200},
		{10, 250, 4294967306, 250},
		{3, 30, 4294967309, 280},
	} {
		c = c.add(trace.Traffic{Connections: step.conns, BytesIn: step.bytes})
		if c.total.Connections != step.want || c.total.BytesIn != step.wantBytes {
			t.Errorf("after %+v: %+v", step, c.total)
		}
	}
}

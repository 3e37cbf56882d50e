package node

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/correlate"
	"github.com/kptrace/kptrace/trace/source/ctevent"
	"github.com/kptrace/kptrace/trace/source/nflog"
)

// hotPath is all that events pass through between two sockets: decoders,
// queue, correlator, history and ring. Bytes go in as the kernel sends them.
type hotPath struct {
	tracer   *tracer
	c        *correlate.Correlator
	log      *nflog.Decoder
	ct       *ctevent.Decoder
	pick     string
	endpoint netip.AddrPort
	now      time.Time
	n        int
	// What the kernel says of each connection: reports and events.
	reports, events [][]byte
	ends            [][]byte
}

func newHotPath(t testing.TB, conns int) *hotPath {
	t.Helper()
	ep := netip.MustParseAddrPort("10.244.1.2:8080")
	snap := snapshot(ep, netip.MustParseAddrPort("10.244.1.3:8080"))
	program := iptables.New(iptables.Config{Flavour: "nft", Trace: true}).Render(snap, proxy.Overlay{})
	h := &hotPath{endpoint: ep, now: time.Now()}
	views := []*proxy.View{{Mode: proxy.IPTables, Snapshot: snap, Program: program, From: h.now.Add(-time.Hour), Done: h.now.Add(-time.Hour)}}
	for prefix, r := range program.Index() {
		if r.Tag.Kind == proxy.TagPick && r.Endpoint == ep {
			h.pick = prefix
		}
	}
	if h.pick == "" {
		t.Fatal("no rule reports a pick")
	}
	h.tracer = newTracer(Config{Name: "node1", MasqueradeMark: 0x4000}, func() []*proxy.View { return views })
	x := h.tracer
	h.log, h.ct = nflog.NewDecoder(x.lookup), ctevent.NewDecoder()
	h.c = correlate.New(correlate.Config{Node: "node1", Views: x.views, Emit: x.emit, Ask: x.ask, MaxFlows: maxFlows,
		Watched: func() bool { return x.watchers.Load() > 0 }})
	for i := range conns {
		h.prepare(i)
	}
	return h
}

// prepare makes the bytes of one connection.
func (h *hotPath) prepare(i int) {
	client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, 2, byte(i / 50000)}), uint16(10000+i%50000))
	service := netip.AddrPortFrom(clusterIP, 80)
	const (
		fin, syn, ack = 1, 2, 16
	)
	at := func(offset time.Duration) time.Time { return h.now.Add(time.Duration(i)*100*time.Microsecond + offset) }
	log := appendReport(nil, h.pick, at(0), client, service, syn)
	log = appendReport(log, proxy.Tag{Kind: proxy.TagSynAck}.String(), at(30*time.Microsecond), h.endpoint, client, syn|ack)
	log = appendReport(log, proxy.Tag{Kind: proxy.TagFin}.String(), at(60*time.Microsecond), h.endpoint, client, fin|ack)
	log = appendReport(log, proxy.Tag{Kind: proxy.TagFin}.String(), at(80*time.Microsecond), client, service, fin|ack)
	h.reports = append(h.reports, log)
	h.events = append(h.events, appendEntry(nil, false, client, service, h.endpoint))
	h.ends = append(h.ends, appendEntry(nil, true, client, service, h.endpoint))
}

// appendReport appends what NFLOG says of a TCP packet without data.
func appendReport(b []byte, prefix string, at time.Time, src, dst netip.AddrPort, flags byte) []byte {
	be := binary.BigEndian
	packet := make([]byte, 40)
	packet[0], packet[8], packet[9] = 0x45, 64, byte(conntrack.TCP)
	be.PutUint16(packet[2:], 40)
	copy(packet[12:], src.Addr().AsSlice())
	copy(packet[16:], dst.Addr().AsSlice())
	be.PutUint16(packet[20:], src.Port())
	be.PutUint16(packet[22:], dst.Port())
	be.PutUint32(packet[24:], 1000)
	packet[32], packet[33] = 5<<4, flags
	stamp := be.AppendUint64(nil, uint64(at.Unix()))
	stamp = be.AppendUint64(stamp, uint64(at.Nanosecond()/1000))
	attrs := nfnl.AppendAttr(nil, 1, 8, 0, 0, 0) // the packet's header: IPv4, PREROUTING
	attrs = nfnl.AppendAttr(attrs, 10, append([]byte(prefix), 0)...)
	attrs = nfnl.AppendAttr(attrs, 4, be.AppendUint32(nil, 7)...)
	attrs = nfnl.AppendAttr(attrs, 3, stamp...)
	attrs = nfnl.AppendAttr(attrs, 9, packet...)
	return nfnl.AppendMessage(b, nfnl.Type(nfnl.SubsysULog, 0), 0, 0, nfnl.FamilyIPv4, 0, attrs)
}

// appendEntry appends what conntrack says of the making or end of an entry.
func appendEntry(b []byte, destroy bool, client, service, endpoint netip.AddrPort) []byte {
	be := binary.BigEndian
	const nested = 0x8000
	tuple := func(src, dst netip.AddrPort) []byte {
		ip := nfnl.AppendAttr(nil, 1, src.Addr().AsSlice()...)
		ip = nfnl.AppendAttr(ip, 2, dst.Addr().AsSlice()...)
		proto := nfnl.AppendAttr(nil, 1, byte(conntrack.TCP))
		proto = nfnl.AppendAttr(proto, 2, be.AppendUint16(nil, src.Port())...)
		proto = nfnl.AppendAttr(proto, 3, be.AppendUint16(nil, dst.Port())...)
		return nfnl.AppendAttr(nfnl.AppendAttr(nil, 1|nested, ip...), 2|nested, proto...)
	}
	status, typ, flags := conntrack.DstNAT, byte(0), uint16(nfnl.FlagCreate|nfnl.FlagExcl)
	if destroy {
		status, typ, flags = status|conntrack.SeenReply, 2, 0
	}
	attrs := nfnl.AppendAttr(nil, 1|nested, tuple(client, service)...)
	attrs = nfnl.AppendAttr(attrs, 2|nested, tuple(endpoint, client)...)
	attrs = nfnl.AppendAttr(attrs, 12, be.AppendUint32(nil, uint32(client.Port()))...)
	attrs = nfnl.AppendAttr(attrs, 3, be.AppendUint32(nil, uint32(status))...)
	if destroy {
		counters := nfnl.AppendAttr(nil, 1, be.AppendUint64(nil, 5)...)
		counters = nfnl.AppendAttr(counters, 2, be.AppendUint64(nil, 500)...)
		attrs = nfnl.AppendAttr(attrs, 9|nested, counters...)
		attrs = nfnl.AppendAttr(attrs, 10|nested, counters...)
	}
	return nfnl.AppendMessage(b, nfnl.Type(nfnl.SubsysConntrack, typ), flags, 0, nfnl.FamilyIPv4, 0, attrs)
}

// connection passes the next connection through, from its SYN to the removal
// of its entry.
func (h *hotPath) connection() {
	i := h.n % len(h.reports)
	h.n++
	now := h.now.Add(time.Duration(h.n) * 100 * time.Microsecond)
	pass := func(dec trace.Decoder, source trace.SourceID, data []byte) {
		h.tracer.enqueue(dec, trace.Frame{Source: source, Time: now.UnixNano(), Data: data})
		b := <-h.tracer.queue
		for i := range b.events {
			h.c.Handle(&b.events[i])
		}
		h.tracer.pool.Put(b)
	}
	pass(h.log, trace.NFLog, h.reports[i])
	pass(h.ct, trace.Conntrack, h.events[i])
	if h.n%500 == 0 { // each 50 ms
		h.c.Advance(now)
	}
	if before := i - 1000; before >= 0 {
		pass(h.ct, trace.Conntrack, h.ends[before])
	}
}

// TestHotPathAllocations bounds what a connection allocates between the
// sockets, while nobody follows and while somebody does.
func TestHotPathAllocations(t *testing.T) {
	for _, tt := range []struct {
		name     string
		watchers int64
		most     float64
	}{
		// Two updates (the end, and the counters), each with its place in the
		// ring, and the History's entry.
		{"unwatched", 0, 5},
		// One for each change: picked, answered, ended, counted.
		{"watched", 1, 9},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const runs = 8000
			h := newHotPath(t, 10_000)
			h.tracer.watchers.Store(tt.watchers)
			for range 1500 {
				h.connection()
			}
			n := testing.AllocsPerRun(runs, h.connection)
			t.Logf("%v allocations per connection", n)
			if n > tt.most {
				t.Errorf("%v allocations per connection, want at most %v", n, tt.most)
			}
			st := h.c.Stats()
			if st.Flows < runs || st.Foreign+st.Late > 0 || h.tracer.ring.Stats().Published < runs {
				t.Errorf("the connections did not pass: %+v", st)
			}
		})
	}
}

// BenchmarkHotPath is one connection from the bytes of its events to ring and
// history.
func BenchmarkHotPath(b *testing.B) {
	for _, watchers := range []int64{0, 1} {
		b.Run(map[int64]string{0: "unwatched", 1: "watched"}[watchers], func(b *testing.B) {
			b.ReportAllocs()
			h := newHotPath(b, 10_000)
			h.tracer.watchers.Store(watchers)
			for b.Loop() {
				if h.n == len(h.reports) { // a new one, as times go on
					b.StopTimer()
					h = newHotPath(b, 10_000)
					h.tracer.watchers.Store(watchers)
					b.StartTimer()
				}
				h.connection()
			}
		})
	}
}

package node

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"os"
	"testing"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/record/redact"
	"github.com/kptrace/kptrace/trace/source/ctevent"
	"github.com/kptrace/kptrace/trace/source/ipvs"
	"github.com/kptrace/kptrace/trace/source/legacytrace"
	"github.com/kptrace/kptrace/trace/source/nflog"
	"github.com/kptrace/kptrace/trace/source/nftrace"
)

// TestRedactedFrames redacts what real kernels sent. Decoded, it tells the same but for
// addresses, of which none is left in any byte.
func TestRedactedFrames(t *testing.T) {
	t.Parallel()
	r := redact.New(redact.All, []byte("a key of a test, 32 bytes or more"))
	tuple := func(x conntrack.Tuple) conntrack.Tuple {
		if x.IsZero() {
			return x
		}
		return conntrack.NewTuple(x.Proto(), r.AddrPort(x.Src()), r.AddrPort(x.Dst()))
	}
	for _, c := range []struct {
		source trace.SourceID
		file   string
	}{
		{trace.NFLog, "nflog/testdata/legacy.frame"}, {trace.NFLog, "nflog/testdata/nft.frame"},
		{trace.Conntrack, "ctevent/testdata/legacy.frame"}, {trace.Conntrack, "ctevent/testdata/nft.frame"},
		{trace.LegacyTrace, "legacytrace/testdata/nodeport.frame"}, {trace.NFTrace, "nftrace/testdata/nodeport.frame"},
		{trace.IPVS, "ipvs/testdata/ip_vs"}, {trace.IPVS, "ipvs/testdata/ip_vs_conn"},
	} {
		data, err := os.ReadFile("../trace/source/" + c.file)
		if err != nil {
			t.Fatal(err)
		}
		// Those of loopback, which mean the same everywhere, would stay.
		data = bytes.ReplaceAll(data, []byte{127, 0, 0}, []byte{10, 96, 3})
		before := trace.Frame{Source: c.source, Time: 42, Data: data}
		keep := bytes.Clone(data)
		after, ok := r.Frame(before)
		if !ok || !bytes.Equal(data, keep) {
			t.Fatalf("%s: redacted %v, or the frame itself was changed", c.file, ok)
		}
		addrs := map[netip.Addr]bool{}
		note := func(x conntrack.Tuple) {
			for _, a := range []netip.Addr{x.Src().Addr(), x.Dst().Addr()} {
				if a.IsValid() && r.Addr(a) != a {
					addrs[a] = true
				}
			}
		}
		switch c.source {
		case trace.NFTrace, trace.LegacyTrace:
			var d, e trace.HitDecoder = nftrace.NewDecoder(), nftrace.NewDecoder()
			if c.source == trace.LegacyTrace {
				d, e = legacytrace.NewDecoder(), legacytrace.NewDecoder()
			}
			was, is := d.DecodeHits(before, nil), e.DecodeHits(after, nil)
			if len(was) == 0 || len(was) != len(is) {
				t.Fatalf("%s: %d hits, %d redacted", c.file, len(was), len(is))
			}
			for i := range was {
				note(was[i].Packet.Tuple)
				want := was[i]
				want.Packet.Tuple, want.Packet.Head = tuple(want.Packet.Tuple), is[i].Packet.Head
				want.Chain, want.Target = is[i].Chain, is[i].Target
				if len(was[i].Chain) != len(is[i].Chain) || want != is[i] {
					t.Fatalf("%s: hit %d: want %+v, got %+v", c.file, i, want, is[i])
				}
			}
		default:
			decode := func(f trace.Frame) []trace.Event {
				var d trace.Decoder = nflog.NewDecoder(nil)
				switch f.Source {
				case trace.Conntrack:
					d = ctevent.NewDecoder()
				case trace.IPVS:
					d = ipvs.NewDecoder()
				}
				return d.Decode(f, nil)
			}
			was, is := decode(before), decode(after)
			if len(was) == 0 || len(was) != len(is) {
				t.Fatalf("%s: %d events, %d redacted", c.file, len(was), len(is))
			}
			for i := range was {
				note(was[i].Tuple)
				note(was[i].Reply)
				want := was[i]
				want.Tuple, want.Reply = tuple(want.Tuple), tuple(want.Reply)
				if from := netip.AddrFrom16(want.ICMPFrom); want.ICMPFrom != ([16]byte{}) {
					want.ICMPFrom = r.Addr(from).As16()
				}
				if want != is[i] {
					t.Fatalf("%s: event %d: want %+v, got %+v", c.file, i, want, is[i])
				}
			}
		}
		if len(addrs) == 0 {
			t.Errorf("%s: there was nothing to redact", c.file)
		}
		if c.source == trace.IPVS {
			continue // in hexadecimal, which the decoder has read
		}
		for a := range addrs {
			if bytes.Contains(after.Data, a.AsSlice()) {
				t.Errorf("%s: %v is still in it", c.file, a)
			}
		}
	}
}

// FuzzRedactFrame gives it anything.
func FuzzRedactFrame(f *testing.F) {
	for _, name := range []string{"nflog/testdata/nft.frame", "ctevent/testdata/nft.frame", "nftrace/testdata/nodeport.frame"} {
		b, err := os.ReadFile("../trace/source/" + name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(0), b[:min(len(b), 2000)])
	}
	b := make([]byte, 300)
	for i := range b {
		b[i] = byte(rand.Uint32()) //nolint:gosec // any bytes
	}
	f.Add(uint8(5), b)
	f.Fuzz(func(t *testing.T, source uint8, data []byte) {
		r := redact.New(redact.All, []byte("key"))
		out, ok := r.Frame(trace.Frame{Source: trace.SourceID(source % 9), Data: data})
		if ok && trace.SourceID(source%9) != trace.IPVS && len(out.Data) != len(data) {
			t.Errorf("%d bytes became %d", len(data), len(out.Data))
		}
	})
}

package legacytrace

import (
	_ "embed"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/trace"
)

// nodeport is what the kernel sent of one SYN to a node port, and of its SYN-ACK.
//
//go:embed testdata/nodeport.frame
var nodeport []byte

func TestDecode(t *testing.T) {
	d := NewDecoder()
	hits := d.DecodeHits(trace.Frame{Source: trace.LegacyTrace, Time: 42, Data: nodeport}, nil)
	if st := d.Stats(); len(hits) < 30 || st.Events != uint64(len(hits)) || st.Damaged != 0 || st.Foreign != 0 {
		t.Fatalf("%d hits, stats %+v", len(hits), st)
	}
	var ends, policies, rules int
	where := map[string]bool{}
	for i := range hits {
		h := &hits[i]
		if h.Source != trace.LegacyTrace || h.Family != nfnl.FamilyIPv4 || h.Table == "" || h.Chain == "" || !h.HasMark {
			t.Errorf("hit %d: %+v", i, h)
		}
		switch h.Kind {
		case trace.HopRule:
			rules++
		case trace.HopEnd:
			ends++
		case trace.HopPolicy:
			policies++
		}
		name, _, _ := strings.Cut(h.Chain, "-")
		where[h.Table+" "+name] = true
		if h.Handle != 0 || h.Verdict != "" || h.Number == 0 || !h.HasHook || !h.HasPacket || h.TraceID != 0 {
			t.Errorf("hit %d: %+v", i, h)
		}
	}
	for _, want := range []string{"raw PREROUTING", "mangle PREROUTING", "mangle KPTRACE", "nat PREROUTING", "nat KUBE", "filter FORWARD", "nat POSTROUTING"} {
		if !where[want] {
			t.Errorf("nothing of %s in %v", want, where)
		}
	}
	if rules < 15 || ends < 3 || policies < 4 {
		t.Errorf("%d rules, %d ends, %d policies", rules, ends, policies)
	}
}

// TestDecodeDoesNotAllocate once it knows the names.
func TestDecodeDoesNotAllocate(t *testing.T) {
	d := NewDecoder()
	f := trace.Frame{Source: trace.LegacyTrace, Data: nodeport}
	hits := d.DecodeHits(f, nil)
	if n := testing.AllocsPerRun(20, func() { hits = d.DecodeHits(f, hits[:0]) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(nodeport)
	for n := 1; n < len(nodeport); n += 97 {
		f.Add(nodeport[:n])
	}
	f.Fuzz(func(_ *testing.T, data []byte) {
		NewDecoder().DecodeHits(trace.Frame{Data: data}, nil)
	})
}

func TestPrefix(t *testing.T) {
	for prefix, want := range map[string]place{
		"TRACE: nat:KUBE-SERVICES:rule:3 ":       {"nat", "KUBE-SERVICES", trace.HopRule, 3, true},
		"TRACE: filter:FORWARD:policy:5 ":        {"filter", "FORWARD", trace.HopPolicy, 5, true},
		"TRACE: nat:KUBE-SVC-X:return:4":         {"nat", "KUBE-SVC-X", trace.HopEnd, 4, true},
		"TRACE: raw:odd:name:rule:12 ":           {"raw", "odd:name", trace.HopRule, 12, true},
		"TRACE: raw:X:rule:99999999999999999999": {},
		"TRACE: raw:X:verdict:1":                 {},
		"TRACE: raw::rule:1":                     {},
		"TRACE: :X:rule:1":                       {},
		"TRACE: raw":                             {},
		"kp1:pick:X":                             {},
		"":                                       {},
	} {
		if got := parsePrefix(prefix); got != want {
			t.Errorf("%q: got %+v, want %+v", prefix, got, want)
		}
	}
}

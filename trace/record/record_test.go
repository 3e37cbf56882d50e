package record

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

func written(t *testing.T) (file []byte, s State) {
	t.Helper()
	var b bytes.Buffer
	w, err := NewWriter(&b, Header{Version: "v1", Node: "node1", Mode: proxy.IPTables, Started: time.Unix(10, 0).UTC()})
	if err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr("10.1.0.2")
	s = State{Mode: proxy.IPTables, From: time.Unix(9, 0).UTC(), Rules4: "*nat\nCOMMIT\n", Snapshot: &proxy.Snapshot{
		Node: proxy.Node{Name: "node1", Addrs: []netip.Addr{netip.MustParseAddr("fd00::1")}},
		Pods: map[netip.Addr]proxy.Pod{ip: {Namespace: "shop", Name: "foo-1"}},
		Services: []proxy.Service{{
			Name: proxy.PortName{Namespace: "shop", Name: "foo", Port: "http", Proto: conntrack.TCP}, ClusterIP: netip.MustParseAddr("10.96.0.10"),
			Port: 80, Affinity: time.Hour, Endpoints: []proxy.Endpoint{{Addr: netip.AddrPortFrom(ip, 8080), Ready: true}},
		}},
	}}
	for _, err := range []error{
		w.Affinity(Affinity{Complete: true, Clients: []Client{{ip, s.Snapshot.Services[0].Name, netip.AddrPortFrom(ip, 8080), 5, true, false}}}),
		w.State(s),
		w.Frame(trace.Frame{Source: trace.Conntrack, Time: 11e9, Data: []byte("one")}),
		w.Loss(trace.Loss{Source: trace.NFLog, From: 1, To: 2, Events: 3, Where: "kernel"}),
		w.Frame(trace.Frame{Source: trace.NFLog, Time: 12e9}),
		w.Rules(Rules{Source: trace.NFTrace, From: 5, Rules4: "*nat\nCOMMIT\n", Chains: []Chain{{2, "nat", "PREROUTING", "", []uint64{7, 9}}}}),
		w.Names(Names{Devices: map[uint32]string{3: "eth0"}, Reasons: map[uint32]string{2: "NO_SOCKET"}}),
		w.End(7),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes(), s
}

// TestRoundTrip reads back what was written.
func TestRoundTrip(t *testing.T) {
	t.Parallel()
	file, s := written(t)
	r, err := NewReader(bytes.NewReader(file))
	if err != nil {
		t.Fatal(err)
	}
	if h := r.Header(); h.Node != "node1" || h.Mode != proxy.IPTables || !h.Started.Equal(time.Unix(10, 0)) {
		t.Errorf("header %+v", h)
	}
	it, err := r.Next()
	if err != nil || it.Affinity == nil || !it.Affinity.Complete || len(it.Affinity.Clients) != 1 ||
		it.Affinity.Clients[0] != (Client{netip.MustParseAddr("10.1.0.2"), s.Snapshot.Services[0].Name, netip.MustParseAddrPort("10.1.0.2:8080"), 5, true, false}) {
		t.Errorf("affinity %+v, %v", it.Affinity, err)
	}
	it, err = r.Next()
	if err != nil || it.State == nil {
		t.Fatalf("%+v, %v", it, err)
	}
	if d := cmp.Diff(s, *it.State, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); d != "" {
		t.Error(d)
	}
	for _, want := range []string{"one", "loss", "", "rules", "names", "end"} {
		it, err := r.Next()
		switch {
		case err != nil:
			t.Fatal(err)
		case want == "loss" && (it.Loss == nil || it.Loss.Events != 3 || it.Loss.Where != "kernel"):
			t.Errorf("loss %+v", it)
		case want == "end" && (it.End == nil || it.End.Frames != 2 || it.End.Dropped != 7):
			t.Errorf("end %+v", it)
		case want == "rules":
			if r := it.Rules; r == nil || r.Source != trace.NFTrace || len(r.Chains) != 1 || r.Chains[0].Handles[1] != 9 {
				t.Errorf("rules %+v", it)
			}
		case want == "names":
			if n := it.Names; n == nil || n.Devices[3] != "eth0" || n.Reasons[2] != "NO_SOCKET" {
				t.Errorf("names %+v", it)
			}
		case want != "loss" && want != "end" && (it.Frame == nil || string(it.Frame.Data) != want):
			t.Errorf("frame %+v, want %q", it, want)
		}
	}
	if _, err := r.Next(); !errors.Is(err, io.EOF) {
		t.Errorf("behind the end: %v", err)
	}
}

// TestBroken cuts and damages a file at every byte: each time what came before is
// read, and then it is said what is wrong.
func TestBroken(t *testing.T) {
	t.Parallel()
	file, _ := written(t)
	all := func(b []byte) (n int, err error) {
		r, err := NewReader(bytes.NewReader(b))
		if err != nil {
			return 0, err
		}
		for {
			if _, err := r.Next(); err != nil {
				return n, err
			}
			n++
		}
	}
	whole, err := all(file)
	if whole != 8 || !errors.Is(err, io.EOF) {
		t.Fatalf("%d items, %v", whole, err)
	}
	for i := range file {
		if _, err := all(file[:i]); errors.Is(err, io.EOF) && !errors.Is(err, ErrCut) || err == nil {
			t.Errorf("cut at %d: %v", i, err)
		}
		b := bytes.Clone(file)
		b[i] ^= 0x55
		if _, err := all(b); !errors.Is(err, ErrForeign) && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrCut) {
			t.Errorf("damaged at %d: %v", i, err)
		}
	}
}

func FuzzReader(f *testing.F) {
	f.Add([]byte(magic))
	f.Fuzz(func(_ *testing.T, b []byte) {
		r, err := NewReader(bytes.NewReader(b))
		for err == nil {
			_, err = r.Next()
		}
	})
}

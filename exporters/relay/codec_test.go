package relay

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
	"google.golang.org/protobuf/proto"
)

// fill gives every field of v a value of its own that is not zero, so that a
// field the codec forgets is seen.
func fill(t *testing.T, v reflect.Value, r *rand.Rand) {
	addr := func() netip.Addr {
		if r.IntN(2) == 0 {
			return netip.AddrFrom4([4]byte{10, byte(r.Uint32()), byte(r.Uint32()), 1})
		}
		return netip.AddrFrom16([16]byte{0xfd, byte(r.Uint32()), byte(r.Uint32()), 15: 1})
	}
	ap := func(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, uint16(1+r.IntN(65535))) }
	var special any
	switch v.Interface().(type) {
	case time.Time:
		special = time.Unix(1_700_000_000, 1+r.Int64N(1e15))
	case conntrack.Tuple:
		a := addr()
		special = conntrack.NewTuple(conntrack.TCP, ap(a), ap(a.Next()))
	case netip.Addr:
		special = addr()
	case netip.AddrPort:
		special = ap(addr())
	case netip.Prefix:
		special = netip.PrefixFrom(addr(), 1+r.IntN(32))
	}
	if special != nil {
		v.Set(reflect.ValueOf(special))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			if !v.Type().Field(i).IsExported() {
				t.Fatalf("%s has the hidden field %s: teach this test to fill it", v.Type(), v.Type().Field(i).Name)
			}
			fill(t, v.Field(i), r)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1+r.IntN(3), 3))
		for i := range v.Len() {
			fill(t, v.Index(i), r)
		}
	case reflect.Array:
		for i := range v.Len() {
			fill(t, v.Index(i), r)
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(t, v.Elem(), r)
	case reflect.String:
		v.SetString(fmt.Sprintf("text%d", r.Uint32()))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(1 + r.Int64N(1<<40))
	case reflect.Uint8:
		v.SetUint(uint64(1 + r.IntN(255)))
	case reflect.Uint16:
		v.SetUint(uint64(1 + r.IntN(65535)))
	case reflect.Uint32:
		v.SetUint(uint64(1 + r.Uint32N(1<<31)))
	case reflect.Uint64:
		v.SetUint(r.Uint64() | 1)
	case reflect.Float64:
		v.SetFloat(r.Float64() + 0.001)
	default:
		t.Fatalf("teach this test to fill a %s", v.Type())
	}
}

// trip takes a value to the wire's bytes and back.
func trip[T any, W proto.Message](t *testing.T, toPB func(*T) W, fromPB func(W) T) {
	t.Helper()
	for seed := range uint64(50) {
		var in T
		fill(t, reflect.ValueOf(&in).Elem(), rand.New(rand.NewPCG(seed, 1)))
		wire := toPB(&in)
		data, err := proto.Marshal(wire)
		if err != nil {
			t.Fatal(err)
		}
		proto.Reset(wire)
		if err := proto.Unmarshal(data, wire); err != nil {
			t.Fatal(err)
		}
		out := fromPB(wire)
		if diff := cmp.Diff(in, out, cmp.Comparer(func(a, b conntrack.Tuple) bool { return a == b }),
			cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
			cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
			cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
			t.Fatalf("changed on the way (-before +after):\n%s", diff)
		}
	}
}

// value makes a conversion to a pointer one to a value.
func value[W, T any](f func(W) *T) func(W) T {
	return func(w W) T { return *f(w) }
}

func TestCodecKeepsEveryField(t *testing.T) {
	t.Run("flow", func(t *testing.T) { trip(t, flowToPB, value(flowFromPB)) })
	t.Run("request", func(t *testing.T) { trip(t, requestToPB, requestFromPB) })
	t.Run("status", func(t *testing.T) { trip(t, statusToPB, value(statusFromPB)) })
	t.Run("header", func(t *testing.T) { trip(t, headerToPB, value(headerFromPB)) })
	t.Run("idle", func(t *testing.T) { trip(t, idleToPB, value(idleFromPB)) })
	t.Run("loss", func(t *testing.T) { trip(t, lossToPB, lossFromPB) })
}

func TestCodecMessages(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	kinds := reflect.TypeFor[trace.Message]()
	for i := range kinds.NumField() {
		if kinds.Field(i).Type.Kind() != reflect.Pointer {
			continue
		}
		in := trace.Message{Node: "node1", Gone: true}
		fill(t, reflect.ValueOf(&in).Elem().Field(i), r)
		out := messageFromPB(messageToPB(&in))
		if !reflect.DeepEqual(in, out) {
			t.Errorf("%s: changed on the way", kinds.Field(i).Name)
		}
	}
}

func TestCodecZeroAndUnknown(t *testing.T) {
	var zero trace.Flow
	if got := flowFromPB(flowToPB(&zero)); !reflect.DeepEqual(*got, zero) {
		t.Errorf("the zero flow became %+v", got)
	}
	flowFromPB(nil)
	flowFromPB(&Flow{Tuple: &Tuple{Src: &AddrPort{Addr: []byte{1}}}, Client: &Peer{Addr: &AddrPort{Addr: make([]byte, 99), Port: 1 << 20}}})
	if m := messageFromPB(&Message{Kind: &Message_Header{}}); m.Header == nil {
		t.Error("an empty header is still a header")
	}
}

func BenchmarkFlowCodec(b *testing.B) {
	var f trace.Flow
	fill(&testing.T{}, reflect.ValueOf(&f).Elem(), rand.New(rand.NewPCG(1, 1)))
	f.Paths, f.Attempts = nil, f.Attempts[:1]
	b.ReportAllocs()
	for b.Loop() {
		data, _ := proto.Marshal(flowToPB(&f))
		var w Flow
		_ = proto.Unmarshal(data, &w)
		flowFromPB(&w)
	}
}

package userspace

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// An event in a Frame is little-endian:
//
//	0  length of all of it        2
//	2  kind, failure, end, flags  1 each; flag 1 is FromNode
//	6  affinity, protocol         1 each
//	8  id, time, age, out, in     8 each; times in ns
//	48 client, dialled, local, upstream: address 16, port 2 each
//	120 tag
const (
	headBytes = 120
	addrBytes = 18
	maxEvent  = headBytes + proxy.MaxTagLen

	flagNode = 1
)

// affinities are the words by their code.
var affinities = [...]trace.Affinity{
	"", trace.AffinityNone, trace.AffinityHit, trace.AffinityNew, trace.AffinityExpired, trace.AffinityReset,
}

func appendEvent(b []byte, e *proxy.RelayEvent) []byte {
	start := len(b)
	var flags, affinity byte
	if e.FromNode {
		flags |= flagNode
	}
	for i, word := range affinities {
		if string(word) == e.Affinity {
			affinity = byte(i)
		}
	}
	b = append(b, 0, 0, byte(e.Kind), byte(e.Failure), byte(e.End), flags, affinity, byte(e.Tuple.Proto()))
	for _, n := range [...]uint64{e.ID, uint64(e.Time.UnixNano()), uint64(e.Age), e.Out, e.In} {
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	for _, a := range [...]netip.AddrPort{e.Tuple.Src(), e.Tuple.Dst(), e.Local, e.Upstream} {
		b = appendAddr(b, a)
	}
	if e.Tag.Kind != proxy.TagNone {
		b = append(b, e.Tag.String()...)
	}
	binary.LittleEndian.PutUint16(b[start:], uint16(len(b)-start))
	return b
}

func appendAddr(b []byte, a netip.AddrPort) []byte {
	var ip [16]byte
	if a.IsValid() {
		ip = a.Addr().As16()
	}
	b = append(b, ip[:]...)
	return binary.LittleEndian.AppendUint16(b, a.Port())
}

func readAddr(b []byte) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b)).Unmap(), binary.LittleEndian.Uint16(b[16:]))
}

// Decoder makes Events of Frames. It has one user at a time.
type Decoder struct {
	lookup           func(tag []byte) *proxy.Rule
	foreign, damaged atomic.Uint64
}

// NewDecoder returns a Decoder that finds rules by lookup; nil knows none.
func NewDecoder(lookup func(tag []byte) *proxy.Rule) *Decoder {
	if lookup == nil {
		lookup = func([]byte) *proxy.Rule { return nil }
	}
	return &Decoder{lookup: lookup}
}

// Decode appends the Frame's events to into.
func (d *Decoder) Decode(f trace.Frame, into []trace.Event) []trace.Event {
	for b := f.Data; len(b) > 0; {
		if len(b) < headBytes {
			d.damaged.Add(1)
			return into
		}
		n := int(binary.LittleEndian.Uint16(b))
		if n < headBytes || n > len(b) {
			d.damaged.Add(1)
			return into
		}
		if e, ok := d.event(b[:n]); ok {
			into = append(into, e)
		}
		b = b[n:]
	}
	return into
}

func (d *Decoder) event(b []byte) (e trace.Event, ok bool) {
	u64 := func(at int) uint64 { return binary.LittleEndian.Uint64(b[at:]) }
	r := &trace.Relayed{
		ID: u64(8), Failure: proxy.RelayFailure(b[3]), End: proxy.RelayEnd(b[4]),
		Age: time.Duration(u64(24)), Upstream: readAddr(b[48+3*addrBytes:]),
	}
	if !r.Upstream.Addr().IsValid() || r.Upstream.Addr().IsUnspecified() {
		r.Upstream = netip.AddrPort{}
	}
	if int(b[6]) < len(affinities) {
		r.Affinity = affinities[b[6]]
	}
	proto := conntrack.Proto(b[7])
	client := readAddr(b[48:])
	e = trace.Event{
		Source: trace.Userspace, Time: int64(u64(16)), Relayed: r, Rule: d.lookup(b[headBytes:]),
		Tuple:  conntrack.NewTuple(proto, client, readAddr(b[48+addrBytes:])),
		Reply:  conntrack.NewTuple(proto, readAddr(b[48+2*addrBytes:]), client),
		TCPSeq: uint32(r.ID),
	}
	e.Out.Bytes, e.In.Bytes = u64(32), u64(40)
	if b[5]&flagNode != 0 {
		e.Hook = hookOutput
	}
	switch proxy.RelayEventKind(b[2]) {
	case proxy.RelayPick:
		e.Kind = trace.KindPick
	case proxy.RelayFailed:
		e.Kind = trace.KindTryFailed
	case proxy.RelayConnected:
		e.Kind = trace.KindConnected
	case proxy.RelayClosed:
		e.Kind = trace.KindRelayEnd
	default:
		d.damaged.Add(1)
		return e, false
	}
	if e.Rule == nil {
		d.foreign.Add(1)
	}
	return e, true
}

// hookOutput is NF_INET_LOCAL_OUT (linux/netfilter.h).
const hookOutput = 3

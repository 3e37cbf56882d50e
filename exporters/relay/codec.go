package relay

import (
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// The functions xToPB and xFromPB carry values to the wire and back without
// loss, except that times lose their monotonic reading and their zone. What
// comes from the wire is never trusted: odd lengths and numbers give zero
// values, not panics.

func timeToPB(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func timeFromPB(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns)
}

func addrFromPB(b []byte) netip.Addr {
	a, _ := netip.AddrFromSlice(b)
	return a
}

func addrPortToPB(a netip.AddrPort) *AddrPort {
	if a == (netip.AddrPort{}) {
		return nil
	}
	return &AddrPort{Addr: a.Addr().AsSlice(), Port: uint32(a.Port())}
}

func addrPortFromPB(a *AddrPort) netip.AddrPort {
	if a == nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(addrFromPB(a.Addr), uint16(a.Port))
}

func tupleToPB(t conntrack.Tuple) *Tuple {
	if t.IsZero() {
		return nil
	}
	return &Tuple{Proto: uint32(t.Proto()), Src: addrPortToPB(t.Src()), Dst: addrPortToPB(t.Dst())}
}

func tupleFromPB(t *Tuple) conntrack.Tuple {
	src, dst := addrPortFromPB(t.GetSrc()), addrPortFromPB(t.GetDst())
	if !src.IsValid() || !dst.IsValid() {
		return conntrack.Tuple{}
	}
	return conntrack.NewTuple(conntrack.Proto(t.Proto), src, dst)
}

func portNameToPB(n proxy.PortName) *PortName {
	return &PortName{Namespace: n.Namespace, Name: n.Name, Port: n.Port, Proto: uint32(n.Proto)}
}

func portNameFromPB(n *PortName) proxy.PortName {
	return proxy.PortName{
		Namespace: n.GetNamespace(), Name: n.GetName(), Port: n.GetPort(), Proto: conntrack.Proto(n.GetProto()),
	}
}

func peerToPB(p *trace.Peer) *Peer {
	return &Peer{Addr: addrPortToPB(p.Addr), Namespace: p.Namespace, Pod: p.Pod, Node: p.Node, Workload: p.Workload, Zone: p.Zone}
}

func peerFromPB(p *Peer) trace.Peer {
	return trace.Peer{
		Addr: addrPortFromPB(p.GetAddr()), Namespace: p.GetNamespace(), Pod: p.GetPod(),
		Node: p.GetNode(), Workload: p.GetWorkload(), Zone: p.GetZone(),
	}
}

func countersToPB(c conntrack.Counters) *Counters {
	return &Counters{Packets: c.Packets, Bytes: c.Bytes}
}

func countersFromPB(c *Counters) conntrack.Counters {
	return conntrack.Counters{Packets: c.GetPackets(), Bytes: c.GetBytes()}
}

func lossToPB(l *trace.Loss) *Loss {
	return &Loss{Source: uint32(l.Source), From: l.From, To: l.To, Events: l.Events, Where: l.Where}
}

func lossFromPB(l *Loss) trace.Loss {
	return trace.Loss{
		Source: trace.SourceID(l.GetSource()), From: l.GetFrom(), To: l.GetTo(),
		Events: l.GetEvents(), Where: l.GetWhere(),
	}
}

// each converts a list; an empty one gives nil.
func each[A, B any](list []A, convert func(A) B) []B {
	if len(list) == 0 {
		return nil
	}
	out := make([]B, len(list))
	for i, a := range list {
		out[i] = convert(a)
	}
	return out
}

// ref makes a conversion from a pointer one from a value.
func ref[A, B any](convert func(*A) B) func(A) B {
	return func(a A) B { return convert(&a) }
}

package ctevent

import (
	"sync/atomic"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/trace"
)

// Message types of the conntrack subsystem. A NEW and an UPDATE are the same
// type and differ by their flags.
const (
	typeNew     = nfnl.SubsysConntrack << 8
	typeDestroy = nfnl.SubsysConntrack<<8 | 2
)

// The attributes of an entry (linux/netfilter/nfnetlink_conntrack.h).
const (
	ctaTupleOrig      = 1
	ctaTupleReply     = 2
	ctaStatus         = 3
	ctaProtoInfo      = 4
	ctaTimeout        = 7
	ctaMark           = 8
	ctaCountersOrig   = 9
	ctaCountersReply  = 10
	ctaID             = 12
	ctaTimestamp      = 20
	ctaTimestampEvent = 27

	ctaTupleIP, ctaTupleProto                 = 1, 2
	ctaIPv4Src, ctaIPv4Dst                    = 1, 2
	ctaIPv6Src, ctaIPv6Dst                    = 3, 4
	ctaProtoNum, ctaProtoSport, ctaProtoDport = 1, 2, 3

	ctaProtoInfoTCP      = 1
	ctaProtoInfoTCPState = 1

	ctaCountersPackets, ctaCountersBytes = 1, 2
	ctaTimestampStart, ctaTimestampStop  = 1, 2
)

// Decoder makes Events of conntrack Frames. It has one user at a time, except
// for Stats, and no memory: an event depends on nothing but its bytes.
type Decoder struct {
	events, foreign, damaged atomic.Uint64
}

// NewDecoder returns a Decoder.
func NewDecoder() *Decoder { return &Decoder{} }

// Stats counts the events decoded, those left out (updates, and entries that
// no Service can have), and those that made no sense.
func (d *Decoder) Stats() trace.SourceStats {
	return trace.SourceStats{
		Source: trace.Conntrack, Events: d.events.Load(),
		Foreign: d.foreign.Load(), Damaged: d.damaged.Load(),
	}
}

// Decode implements trace.Decoder. It does not allocate unless into must grow.
// An event has the kernel's time from Linux 6.14 on where
// nf_conntrack_timestamp is set, and the Frame's otherwise.
func (d *Decoder) Decode(f trace.Frame, into []trace.Event) []trace.Event {
	var events, foreign, damaged uint64
	m := nfnl.NewMessages(f.Data)
	for m.Next() {
		kind := kindOf(m.Type, m.Flags)
		if kind == trace.KindNone {
			foreign++
			continue
		}
		into = append(into, trace.Event{})
		e := &into[len(into)-1]
		e.Kind, e.Source, e.Time = kind, trace.Conntrack, f.Time
		switch readEntry(m.Attrs(), e) {
		case entryOK:
			events++
			continue
		case entryForeign:
			foreign++
		case entryDamaged:
			damaged++
		}
		into = into[:len(into)-1]
	}
	if m.Damaged() {
		damaged++
	}
	d.events.Add(events)
	d.foreign.Add(foreign)
	d.damaged.Add(damaged)
	return into
}

func kindOf(typ, flags uint16) trace.EventKind {
	switch {
	case typ == typeNew && flags&(nfnl.FlagCreate|nfnl.FlagExcl) != 0:
		return trace.KindNew
	case typ == typeDestroy:
		return trace.KindDestroy
	}
	return trace.KindNone
}

type verdict uint8

const (
	entryOK verdict = iota
	entryForeign
	entryDamaged
)

// readEntry fills in e from the attributes of an entry.
func readEntry(a nfnl.Attrs, e *trace.Event) verdict {
	v := entryOK
	worst := func(w verdict) { v = max(v, w) }
	for a.Next() {
		switch a.Type {
		case ctaTupleOrig:
			worst(readTuple(a.Data, &e.Tuple))
		case ctaTupleReply:
			worst(readTuple(a.Data, &e.Reply))
		case ctaStatus:
			e.Status = conntrack.Status(a.Uint32())
		case ctaProtoInfo:
			e.TCPState = conntrack.TCPState(readProtoInfo(a.Data))
		case ctaTimeout:
			e.Timeout = a.Uint32()
		case ctaMark:
			e.Mark = a.Uint32()
		case ctaCountersOrig:
			e.Out = readCounters(a.Data)
		case ctaCountersReply:
			e.In = readCounters(a.Data)
		case ctaID:
			e.CTID = a.Uint32()
		case ctaTimestamp:
			for t := nfnl.NewAttrs(a.Data); t.Next(); {
				switch t.Type {
				case ctaTimestampStart:
					e.Start = int64(t.Uint64())
				case ctaTimestampStop:
					e.Stop = int64(t.Uint64())
				}
			}
		case ctaTimestampEvent:
			if t := int64(a.Uint64()); t > 0 {
				e.Time, e.KernelTime = t, true
			}
		}
	}
	if a.Damaged() || v == entryOK && (e.Tuple.IsZero() || e.Reply.IsZero()) {
		return entryDamaged
	}
	return v
}

// readTuple reads one direction of an entry.
func readTuple(data []byte, t *conntrack.Tuple) verdict {
	var src, dst []byte
	var proto conntrack.Proto
	var sport, dport uint16
	a := nfnl.NewAttrs(data)
	for a.Next() {
		in := nfnl.NewAttrs(a.Data)
		switch a.Type {
		case ctaTupleIP:
			for in.Next() {
				switch in.Type {
				case ctaIPv4Src, ctaIPv6Src:
					src = in.Data
				case ctaIPv4Dst, ctaIPv6Dst:
					dst = in.Data
				}
			}
		case ctaTupleProto:
			for in.Next() {
				switch in.Type {
				case ctaProtoNum:
					proto = conntrack.Proto(in.Uint8())
				case ctaProtoSport:
					sport = in.Uint16()
				case ctaProtoDport:
					dport = in.Uint16()
				}
			}
		}
		if in.Damaged() {
			return entryDamaged
		}
	}
	switch {
	case a.Damaged() || proto == 0:
		return entryDamaged
	case proto != conntrack.TCP && proto != conntrack.UDP && proto != conntrack.SCTP:
		return entryForeign
	case len(src) == 4 && len(dst) == 4:
		*t = conntrack.TupleOf4(proto, src, dst, sport, dport)
	case len(src) == 16 && len(dst) == 16:
		*t = conntrack.TupleOf6(proto, src, dst, sport, dport)
	default:
		return entryDamaged
	}
	return entryOK
}

func readProtoInfo(data []byte) uint8 {
	for a := nfnl.NewAttrs(data); a.Next(); {
		if a.Type != ctaProtoInfoTCP {
			continue
		}
		for in := nfnl.NewAttrs(a.Data); in.Next(); {
			if in.Type == ctaProtoInfoTCPState {
				return in.Uint8()
			}
		}
	}
	return 0
}

func readCounters(data []byte) conntrack.Counters {
	var c conntrack.Counters
	for a := nfnl.NewAttrs(data); a.Next(); {
		switch a.Type {
		case ctaCountersPackets:
			c.Packets = a.Uint64()
		case ctaCountersBytes:
			c.Bytes = a.Uint64()
		}
	}
	return c
}

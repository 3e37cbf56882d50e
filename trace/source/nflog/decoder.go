package nflog

import (
	"encoding/binary"
	"sync/atomic"
	"time"

	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// typePacket is NFULNL_MSG_PACKET of the ULOG subsystem.
const typePacket = nfnl.SubsysULog << 8

// The attributes of a report (linux/netfilter/nfnetlink_log.h).
const (
	attrPacketHdr = 1
	attrMark      = 2
	attrTimestamp = 3
	attrInDev     = 4
	attrOutDev    = 5
	attrPhysIn    = 6
	attrPhysOut   = 7
	attrPayload   = 9
	attrPrefix    = 10
	attrSeq       = 12
)

// ours begins every prefix that may be a proxy.Tag of ours.
const ours = "kp1:"

// maxUnknown bounds the memory for tags that no index knows.
const maxUnknown = 4096

// Decoder makes Events of NFLOG Frames. It has one user at a time, except for
// Stats, and depends on nothing but the Frames and the lookup: a recording
// gives the Events the live stream gave.
type Decoder struct {
	// Packets, if not nil, gets the packet of each event, from the IP header
	// on, as much of it as was copied. The bytes are the Frame's.
	Packets func(e *trace.Event, packet []byte)

	lookup func(prefix []byte) *proxy.Rule
	// unknown remembers the kinds of tags of ours that the lookup does not
	// know, so that they cost no allocation either.
	unknown map[string]trace.EventKind

	foreign, damaged, events atomic.Uint64
}

// NewDecoder returns a Decoder. A tag that lookup does not know gives an Event
// with its Kind and without a Rule; a nil lookup knows none.
func NewDecoder(lookup func(prefix []byte) *proxy.Rule) *Decoder {
	if lookup == nil {
		lookup = func([]byte) *proxy.Rule { return nil }
	}
	return &Decoder{lookup: lookup, unknown: map[string]trace.EventKind{}}
}

// Stats counts the events decoded, the reports with foreign prefixes, which
// give none, and those that made no sense.
func (d *Decoder) Stats() trace.SourceStats {
	return trace.SourceStats{
		Source: trace.NFLog, Events: d.events.Load(),
		Foreign: d.foreign.Load(), Damaged: d.damaged.Load(),
	}
}

// Decode implements trace.Decoder. It does not allocate unless into must grow.
func (d *Decoder) Decode(f trace.Frame, into []trace.Event) []trace.Event {
	first := len(into)
	var foreign, damaged uint64
	var packets [][]byte
	m := nfnl.NewMessages(f.Data)
	for m.Next() {
		if m.Type != typePacket {
			continue
		}
		r := report{}
		if !r.read(m.Attrs()) {
			damaged++
			continue
		}
		rule, kind := d.kindOf(r.prefix)
		if kind == trace.KindNone {
			foreign++
			continue
		}
		into = append(into, trace.Event{})
		e := &into[len(into)-1]
		e.Kind, e.Source, e.Rule = kind, trace.NFLog, rule
		if !r.describe(e) {
			into = into[:len(into)-1]
			damaged++
		} else if d.Packets != nil {
			packets = append(packets, r.payload)
		}
	}
	if m.Damaged() {
		damaged++
	}
	stamp(into[first:], f.Time)
	for i, p := range packets {
		d.Packets(&into[first+i], p)
	}
	d.events.Add(uint64(len(into) - first))
	d.foreign.Add(foreign)
	d.damaged.Add(damaged)
	return into
}

// stamp gives every event without a kernel time that of a neighbour: of the
// next event that has one, or else of the one before. So the order of events
// and the order of their times agree, which matters more than the few
// milliseconds this can be off. Stamps that the Frame's time cannot explain
// are not used for that.
func stamp(events []trace.Event, now int64) {
	near := func(e *trace.Event) bool {
		return e.KernelTime && e.Time <= now && now-e.Time < int64(time.Second)
	}
	t := now
	for i := range events {
		if e := &events[i]; near(e) {
			t = e.Time
		} else if !e.KernelTime {
			e.Time = t
		}
	}
	t = 0
	for i := len(events) - 1; i >= 0; i-- {
		if e := &events[i]; near(e) {
			t = e.Time
		} else if !e.KernelTime && t != 0 {
			e.Time = t
		}
	}
}

func (d *Decoder) kindOf(prefix []byte) (*proxy.Rule, trace.EventKind) {
	if rule := d.lookup(prefix); rule != nil {
		return rule, trace.KindOf(rule.Tag.Kind)
	}
	if len(prefix) < len(ours) || string(prefix[:len(ours)]) != ours {
		return nil, trace.KindNone
	}
	kind, ok := d.unknown[string(prefix)]
	if !ok {
		tag, _ := proxy.ParseTag(string(prefix))
		kind = trace.KindOf(tag.Kind)
		if len(d.unknown) < maxUnknown {
			d.unknown[string(prefix)] = kind
		}
	}
	return nil, kind
}

// report is one NFLOG message taken apart.
type report struct {
	prefix, payload                      []byte
	time                                 int64
	mark, inDev, outDev, physIn, physOut uint32
	hook                                 uint8
}

// read takes the attributes apart; it fails where they are broken or one that
// every report has is missing.
func (r *report) read(a nfnl.Attrs) bool {
	hooked := false
	for a.Next() {
		switch a.Type {
		case attrPacketHdr:
			if len(a.Data) < 4 {
				return false
			}
			r.hook, hooked = a.Data[2], true
		case attrMark:
			r.mark = a.Uint32()
		case attrTimestamp:
			if len(a.Data) < 16 {
				return false
			}
			sec, usec := binary.BigEndian.Uint64(a.Data), binary.BigEndian.Uint64(a.Data[8:])
			r.time = int64(sec)*int64(time.Second) + int64(usec)*int64(time.Microsecond)
		case attrInDev:
			r.inDev = a.Uint32()
		case attrOutDev:
			r.outDev = a.Uint32()
		case attrPhysIn:
			r.physIn = a.Uint32()
		case attrPhysOut:
			r.physOut = a.Uint32()
		case attrPayload:
			r.payload = a.Data
		case attrPrefix:
			r.prefix = a.Data
			if n := len(r.prefix); n > 0 && r.prefix[n-1] == 0 {
				r.prefix = r.prefix[:n-1]
			}
		}
	}
	return hooked && !a.Damaged()
}

func (r *report) describe(e *trace.Event) bool {
	p, ok := parseIP(r.payload)
	if !ok {
		return false
	}
	if e.Kind == trace.KindICMP {
		ok = p.describeICMP(e)
	} else {
		ok = p.describe(e)
	}
	e.Time, e.KernelTime = r.time, r.time != 0
	e.Mark, e.Hook = r.mark, r.hook
	e.InDev, e.OutDev, e.PhysIn, e.PhysOut = r.inDev, r.outDev, r.physIn, r.physOut
	return ok
}

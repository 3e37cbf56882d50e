package legacytrace

import (
	"encoding/binary"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/kptrace/kptrace/internal/nfnl"
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
)

// maxNames bounds the memory for prefixes.
const maxNames = 1 << 17

// Decoder makes RuleHits of legacytrace Frames, which hold nfnetlink_log
// messages. It has one user at a time, except for Stats.
type Decoder struct {
	places map[string]place

	events, damaged, foreign atomic.Uint64
}

// place is what a prefix says.
type place struct {
	table, chain string
	kind         trace.HopKind
	number       uint64
	ok           bool
}

var _ trace.HitDecoder = (*Decoder)(nil)

// NewDecoder returns a Decoder.
func NewDecoder() *Decoder { return &Decoder{places: map[string]place{}} }

// Stats counts what was decoded. Foreign are logs that are no traces.
func (d *Decoder) Stats() trace.SourceStats {
	return trace.SourceStats{
		Source: trace.LegacyTrace, Events: d.events.Load(), Damaged: d.damaged.Load(), Foreign: d.foreign.Load(),
	}
}

// DecodeHits implements trace.HitDecoder.
func (d *Decoder) DecodeHits(f trace.Frame, into []trace.RuleHit) []trace.RuleHit {
	first := len(into)
	var damaged, foreign uint64
	m := nfnl.NewMessages(f.Data)
	for m.Next() {
		if m.Type != typePacket {
			foreign++
			continue
		}
		h := trace.RuleHit{Source: trace.LegacyTrace, Time: f.Time}
		switch ok, ours := d.read(&h, m.Attrs()); {
		case ok:
			into = append(into, h)
		case ours:
			damaged++
		default:
			foreign++
		}
	}
	if m.Damaged() {
		damaged++
	}
	d.events.Add(uint64(len(into) - first))
	d.damaged.Add(damaged)
	d.foreign.Add(foreign)
	return into
}

// read fills h; ours reports whether the prefix is that of a trace.
func (d *Decoder) read(h *trace.RuleHit, a nfnl.Attrs) (ok, ours bool) {
	var payload []byte
	h.HasMark = true // an absent one is 0
	for a.Next() {
		switch a.Type {
		case attrPacketHdr:
			if len(a.Data) >= 4 {
				h.Hook, h.HasHook = a.Data[2], true
			}
		case attrMark:
			h.Mark = a.Uint32()
		case attrTimestamp:
			if len(a.Data) >= 16 {
				sec, usec := binary.BigEndian.Uint64(a.Data), binary.BigEndian.Uint64(a.Data[8:])
				h.Time = int64(sec)*int64(time.Second) + int64(usec)*int64(time.Microsecond)
				h.KernelTime = true
			}
		case attrInDev:
			h.InDev = a.Uint32()
		case attrOutDev:
			h.OutDev = a.Uint32()
		case attrPhysIn:
			h.PhysIn = a.Uint32()
		case attrPhysOut:
			h.PhysOut = a.Uint32()
		case attrPayload:
			payload = a.Data
		case attrPrefix:
			p := d.place(a.Data)
			ours = p.ok
			h.Table, h.Chain, h.Kind, h.Number = p.table, p.chain, p.kind, p.number
		}
	}
	if !ours || a.Damaged() || !h.HasHook {
		return false, ours
	}
	if h.Packet, h.HasPacket = trace.ParseHeader(payload); !h.HasPacket {
		return false, true
	}
	h.Family = nfnl.FamilyIPv4
	if !h.Packet.Tuple.Is4() {
		h.Family = nfnl.FamilyIPv6
	}
	return true, true
}

// place reads a prefix, each only once.
func (d *Decoder) place(prefix []byte) place {
	if n := len(prefix); n > 0 && prefix[n-1] == 0 {
		prefix = prefix[:n-1]
	}
	if p, ok := d.places[string(prefix)]; ok {
		return p
	}
	p := parsePrefix(string(prefix))
	if len(d.places) < maxNames {
		d.places[string(prefix)] = p
	}
	return p
}

// parsePrefix reads "TRACE: nat:KUBE-SERVICES:rule:3 ". A chain's name may hold
// colons.
func parsePrefix(s string) place {
	rest, ok := strings.CutPrefix(strings.TrimRight(s, " "), "TRACE: ")
	if !ok {
		return place{}
	}
	table, rest, _ := strings.Cut(rest, ":")
	i := strings.LastIndexByte(rest, ':')
	if i < 0 {
		return place{}
	}
	number, err := strconv.ParseUint(rest[i+1:], 10, 32)
	j := strings.LastIndexByte(rest[:i], ':')
	if err != nil || j <= 0 || table == "" {
		return place{}
	}
	p := place{table: table, chain: rest[:j], number: number, ok: true}
	switch rest[j+1 : i] {
	case "rule":
		p.kind = trace.HopRule
	case "return":
		p.kind = trace.HopEnd
	case "policy":
		p.kind = trace.HopPolicy
	default:
		return place{}
	}
	return p
}

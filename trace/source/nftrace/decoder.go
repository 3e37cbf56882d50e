package nftrace

import (
	"bytes"
	"sync/atomic"

	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/trace"
)

// From linux/netfilter/nf_tables.h.
const (
	typeTrace = nfnl.SubsysNFTables<<8 | 17 // NFT_MSG_TRACE

	attrTable   = 1
	attrChain   = 2
	attrHandle  = 3
	attrType    = 4
	attrVerdict = 5
	attrID      = 6
	attrNetwork = 8
	attrTransp  = 9
	attrIif     = 10
	attrOif     = 12
	attrMark    = 14
	attrPolicy  = 16
	attrCTID    = 18 // Linux 6.16
	attrCTDir   = 19
	attrCTState = 21

	hitPolicy = 1
	hitReturn = 2
	hitRule   = 3

	verdictCode  = 1
	verdictChain = 2
)

// Verdicts of nf_tables, and those of netfilter.
const (
	verdictContinue = -1
	verdictBreak    = -2
	verdictJump     = -3
	verdictGoto     = -4
	verdictReturn   = -5
	verdictDrop     = 0
	verdictAccept   = 1
	verdictStolen   = 2
	verdictQueue    = 3
)

// maxNames bounds the memory for names of tables and chains.
const maxNames = 1 << 17

// Decoder makes RuleHits of nftrace Frames. It has one user at a time, except
// for Stats.
type Decoder struct {
	names map[string]string

	events, damaged, foreign atomic.Uint64
}

var _ trace.HitDecoder = (*Decoder)(nil)

// NewDecoder returns a Decoder.
func NewDecoder() *Decoder { return &Decoder{names: map[string]string{}} }

// Stats counts what was decoded. Foreign are messages of other kinds.
func (d *Decoder) Stats() trace.SourceStats {
	return trace.SourceStats{
		Source: trace.NFTrace, Events: d.events.Load(), Damaged: d.damaged.Load(), Foreign: d.foreign.Load(),
	}
}

// DecodeHits implements trace.HitDecoder. It allocates only for names it meets
// for the first time, and where into must grow.
func (d *Decoder) DecodeHits(f trace.Frame, into []trace.RuleHit) []trace.RuleHit {
	first := len(into)
	var damaged, foreign uint64
	m := nfnl.NewMessages(f.Data)
	for m.Next() {
		if m.Type != typeTrace {
			foreign++
			continue
		}
		h := trace.RuleHit{Source: trace.NFTrace, Time: f.Time, Family: m.Family}
		if d.read(&h, m.Attrs()) {
			into = append(into, h)
		} else {
			damaged++
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

func (d *Decoder) read(h *trace.RuleHit, a nfnl.Attrs) bool {
	var network, transport []byte
	policy := -1
	for a.Next() {
		switch a.Type {
		case attrTable:
			h.Table = d.name(a.Data)
		case attrChain:
			h.Chain = d.name(a.Data)
		case attrHandle:
			h.Handle = a.Uint64()
		case attrType:
			switch a.Uint32() {
			case hitRule:
				h.Kind = trace.HopRule
			case hitReturn:
				h.Kind = trace.HopEnd
			case hitPolicy:
				h.Kind = trace.HopPolicy
			}
		case attrVerdict:
			d.verdict(h, nfnl.NewAttrs(a.Data))
		case attrID:
			h.TraceID = a.Uint32()
		case attrNetwork:
			network = a.Data
		case attrTransp:
			transport = a.Data
		case attrIif:
			h.InDev = a.Uint32()
		case attrOif:
			h.OutDev = a.Uint32()
		case attrMark:
			h.Mark = a.Uint32()
		case attrPolicy:
			policy = int(a.Uint32())
		case attrCTID:
			h.CTID = a.Uint32()
		case attrCTDir:
			h.CTReply = a.Uint8() == 1
		case attrCTState:
			h.CTState = a.Uint32()
		}
	}
	if a.Damaged() || h.Table == "" || h.Chain == "" || h.Kind == "" {
		return false
	}
	if len(network) > 0 {
		h.Packet, h.HasPacket = trace.ParseHeaders(network, transport)
	}
	if h.Kind == trace.HopPolicy {
		h.Verdict = "accept"
		if policy == verdictDrop {
			h.Verdict = "drop"
		}
	}
	switch {
	case h.Kind == trace.HopEnd && h.Handle != 0: // a rule that returns
		h.Kind, h.Verdict = trace.HopRule, "return"
	case h.Kind == trace.HopEnd, h.Kind == trace.HopRule && h.Handle == 0 && h.Verdict == "match": // no rule was left
		h.Kind, h.Verdict = trace.HopEnd, "return"
	}
	h.HasMark = true // an absent one is 0
	return true
}

func (d *Decoder) verdict(h *trace.RuleHit, a nfnl.Attrs) {
	code, some := int32(0), false
	for a.Next() {
		switch a.Type {
		case verdictCode:
			code, some = int32(a.Uint32()), true
		case verdictChain:
			h.Target = d.name(a.Data)
		}
	}
	if !some {
		return
	}
	switch code {
	case verdictContinue, verdictBreak:
		h.Verdict = "match"
	case verdictJump:
		h.Verdict = "jump"
	case verdictGoto:
		h.Verdict = "goto"
	case verdictReturn:
		h.Verdict = "return"
	case verdictAccept:
		h.Verdict = "accept"
	case verdictDrop:
		h.Verdict = "drop"
	case verdictStolen:
		h.Verdict = "stolen"
	case verdictQueue:
		h.Verdict = "queue"
	default:
		h.Verdict = "unknown"
	}
}

// name returns the text of a NUL-terminated attribute, kept once.
func (d *Decoder) name(b []byte) string {
	b = bytes.TrimRight(b, "\x00")
	if s, ok := d.names[string(b)]; ok {
		return s
	}
	s := string(b)
	if len(d.names) < maxNames {
		d.names[s] = s
	}
	return s
}

package text

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/trace"
)

// PathJSON is one path by itself, as explain prints it.
type PathJSON struct {
	PacketJSON
	Hops []HopJSON `json:"hops"`
}

// PacketJSON is the packet a path is of.
type PacketJSON struct {
	// Packet numbers the packets of a flow whose path is known, from 1; hops
	// refer to it.
	Packet int `json:"packet,omitempty"`
	// Name is "SYN", "SYN-ACK", "udp", …
	Name      string `json:"name"`
	Reply     bool   `json:"reply"`
	Predicted bool   `json:"predicted"`
	Proto     string `json:"proto"`
	From      string `json:"from"`
	To        string `json:"to"`
	// LeftFrom and LeftTo are its addresses as it left the node.
	LeftFrom string `json:"leftFrom,omitempty"`
	LeftTo   string `json:"leftTo,omitempty"`
	// CTID is conntrack's id of the connection.
	CTID uint32 `json:"conntrackId,omitempty"`
	// Probability is the chance of a predicted path.
	Probability *float64 `json:"probability,omitempty"`
	Incomplete  bool     `json:"incomplete,omitempty"`
	Note        string   `json:"note,omitempty"`
}

// HopJSON is one thing a packet met.
type HopJSON struct {
	Packet int           `json:"packet,omitempty"`
	Kind   trace.HopKind `json:"kind"`
	Hook   string        `json:"hook"`
	Table  string        `json:"table,omitempty"`
	Chain  string        `json:"chain,omitempty"`
	Rule   uint64        `json:"rule,omitempty"`
	Handle uint64        `json:"handle,omitempty"`
	// Purpose is the meaning, Text the rule.
	Purpose     string       `json:"purpose,omitempty"`
	Text        string       `json:"text,omitempty"`
	Verdict     string       `json:"verdict,omitempty"`
	Target      string       `json:"target,omitempty"`
	Changes     []ChangeJSON `json:"changes,omitempty"`
	Probability *float64     `json:"probability,omitempty"`
	Time        *time.Time   `json:"time,omitempty"`
	In          string       `json:"in,omitempty"`
	Out         string       `json:"out,omitempty"`
	PhysIn      string       `json:"physIn,omitempty"`
	PhysOut     string       `json:"physOut,omitempty"`
	Mark        string       `json:"mark,omitempty"`
	Source      string       `json:"source,omitempty"`
}

// ChangeJSON is one field that a hop changed.
type ChangeJSON struct {
	Field  string `json:"field"`
	Before string `json:"before,omitempty"`
	After  string `json:"after"`
}

// ToPathJSON converts a path.
func ToPathJSON(p *trace.Path) PathJSON {
	hops := hopsJSON(p)
	if hops == nil {
		hops = []HopJSON{}
	}
	return PathJSON{PacketJSON: packetJSON(p), Hops: hops}
}

func packetJSON(p *trace.Path) PacketJSON {
	out := PacketJSON{
		Packet: p.Number, Name: p.Packet, Reply: p.Reply, Predicted: p.Predicted,
		CTID: p.CTID, Probability: chance(p.Probability), Incomplete: p.Incomplete, Note: p.Note,
	}
	if !p.Tuple.IsZero() {
		out.Proto, out.From, out.To = p.Tuple.Proto().String(), end(p.Tuple.Src()), end(p.Tuple.Dst())
	}
	if !p.Left.IsZero() {
		out.LeftFrom, out.LeftTo = end(p.Left.Src()), end(p.Left.Dst())
	}
	return out
}

func hopsJSON(p *trace.Path) []HopJSON {
	var out []HopJSON
	for i := range p.Hops {
		h := &p.Hops[i]
		j := HopJSON{
			Packet: p.Number, Kind: h.Kind, Hook: h.Hook, Table: h.Table, Chain: h.Chain, Rule: h.Rule, Handle: h.Handle,
			Purpose: h.Purpose, Text: h.Text, Verdict: h.Verdict, Target: h.Target, Probability: chance(h.Probability),
			Time: when(h.Time), In: h.In, Out: h.Out, PhysIn: h.PhysIn, PhysOut: h.PhysOut,
		}
		if h.Mark != 0 {
			j.Mark = fmt.Sprintf("0x%x", h.Mark)
		}
		if !p.Predicted {
			j.Source = h.Source.String()
		}
		for _, c := range h.Changes {
			j.Changes = append(j.Changes, ChangeJSON(c))
		}
		out = append(out, j)
	}
	return out
}

func chance(p float64) *float64 {
	if p <= 0 {
		return nil
	}
	p = round(p, 1e4)
	return &p
}

// end prints one end of a packet, without the port where there is none.
func end(a netip.AddrPort) string {
	if a.Port() == 0 {
		return addr(a)
	}
	return a.String()
}

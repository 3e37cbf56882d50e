package drop

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"

	"github.com/kptrace/kptrace/trace"
)

// A record of the program: the reason in 64 bits, the kernel's monotonic clock in
// 64, and the packet from its IP header on. Where it was read,
// the clock is replaced by that of the wall. All in the machine's byte order.
const (
	packetLen = 64
	recordLen = 16 + packetLen
)

// Decoder makes DropNotices of drop Frames, which hold whole records. It has one
// user at a time, except for Stats.
type Decoder struct {
	// reasons are the names of the numbers, as the kernel's BTF has them.
	reasons map[uint32]string

	events, foreign, damaged atomic.Uint64
}

// NewDecoder returns a Decoder with the names of a kernel's reasons.
func NewDecoder(reasons map[uint32]string) *Decoder { return &Decoder{reasons: reasons} }

// Reasons are the names of the numbers. They must not be changed.
func (d *Decoder) Reasons() map[uint32]string { return d.reasons }

// Stats counts what was decoded. Foreign are packets that are not IP.
func (d *Decoder) Stats() trace.SourceStats {
	return trace.SourceStats{
		Source: trace.Drops, Events: d.events.Load(), Foreign: d.foreign.Load(), Damaged: d.damaged.Load(),
	}
}

// Decode appends the Frame's notices to into. Damaged data is counted and never
// ends in a panic.
func (d *Decoder) Decode(f trace.Frame, into []trace.DropNotice) []trace.DropNotice {
	b := f.Data
	for ; len(b) >= recordLen; b = b[recordLen:] {
		r := b[:recordLen]
		n := trace.DropNotice{Time: int64(binary.NativeEndian.Uint64(r[8:]))}
		reason := binary.NativeEndian.Uint64(r)
		if n.Reason = d.reasons[uint32(reason)]; n.Reason == "" {
			n.Reason = fmt.Sprintf("reason %d", reason)
		}
		var ok bool
		if n.Packet, ok = trace.ParseHeader(r[16:]); !ok {
			d.foreign.Add(1)
			continue
		}
		d.events.Add(1)
		into = append(into, n)
	}
	if len(b) > 0 {
		d.damaged.Add(1)
	}
	return into
}

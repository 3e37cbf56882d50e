package drop

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"sync/atomic"

	"github.com/kptrace/kptrace/trace"
)

// A record of a Frame: the reason in 32 bits, what kind of record it is in 32, the
// time in nanoseconds since 1970 in 64, all in the machine's byte order; the packet
// from its IP header on; the device's index in 32 bits; and the function's name,
// filled up with zeros. Of a segment that is sent again the packet is made up of what
// its socket knows. Frames of earlier recordings have neither device nor function.
const (
	packetAt  = 16
	packetLen = 64
	deviceAt  = packetAt + packetLen
	nameAt    = deviceAt + 4
	recordLen = 112
	oldLen    = deviceAt
)

// The kinds of records.
const (
	kindDrop   = 0
	kindResend = 1
)

// Decoder makes DropNotices and Resends of drop Frames, which hold whole records. It
// has one user at a time, except for Stats.
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

// RecordLen returns the length of the records in a Frame's data.
func RecordLen(data []byte) int {
	if len(data)%recordLen != 0 && len(data)%oldLen == 0 {
		return oldLen
	}
	return recordLen
}

// Decode appends the Frame's notices to drops and resends. Damaged data is counted
// and never ends in a panic.
func (d *Decoder) Decode(f trace.Frame, drops []trace.DropNotice, resends []trace.Resend) ([]trace.DropNotice, []trace.Resend) {
	b, size := f.Data, RecordLen(f.Data)
	for ; len(b) >= size; b = b[size:] {
		r := b[:size]
		reason, kind := binary.NativeEndian.Uint64(r), uint32(0)
		reason, kind = reason&0xffffffff, uint32(reason>>32)
		at := int64(binary.NativeEndian.Uint64(r[8:]))
		packet, ok := trace.ParseHeader(r[packetAt:deviceAt])
		if !ok || kind > kindResend {
			d.foreign.Add(1)
			continue
		}
		d.events.Add(1)
		if kind == kindResend {
			resends = append(resends, trace.Resend{Time: at, Tuple: packet.Tuple, Seq: packet.Seq, Opening: packet.Name() == "SYN"})
			continue
		}
		n := trace.DropNotice{Time: at, Packet: packet}
		if n.Reason = d.reasons[uint32(reason)]; n.Reason == "" {
			n.Reason = fmt.Sprintf("reason %d", reason)
		}
		if size == recordLen {
			n.Device = binary.NativeEndian.Uint32(r[deviceAt:])
			name, _, _ := bytes.Cut(r[nameAt:], []byte{0})
			n.Function = string(name)
		}
		drops = append(drops, n)
	}
	if len(b) > 0 {
		d.damaged.Add(1)
	}
	return drops, resends
}

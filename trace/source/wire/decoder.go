package wire

import (
	"encoding/binary"
	"sync/atomic"

	"github.com/kptrace/kptrace/trace"
)

// A Frame holds records of one packet each, in network byte order: its length
// with this header in 32 bits, the device's index in 32, nanoseconds since 1970
// in 64, and the packet from its Ethernet header on.
const recordLen = 16

const (
	etherLen  = 14
	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
)

// appendRecord appends one packet to a Frame's data.
func appendRecord(b []byte, device uint32, time int64, packet []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(recordLen+len(packet)))
	b = binary.BigEndian.AppendUint32(b, device)
	b = binary.BigEndian.AppendUint64(b, uint64(time))
	return append(b, packet...)
}

// Decoder makes Sightings of wire Frames. It has one user at a time, except for
// Stats.
type Decoder struct {
	events, damaged, foreign atomic.Uint64
}

// NewDecoder returns a Decoder.
func NewDecoder() *Decoder { return &Decoder{} }

// Stats counts what was decoded. Foreign are packets that are not IP, or had come
// before the filter was in place.
func (d *Decoder) Stats() trace.SourceStats {
	return trace.SourceStats{
		Source: trace.Wire, Events: d.events.Load(), Damaged: d.damaged.Load(), Foreign: d.foreign.Load(),
	}
}

// Decode appends the Frame's packets to into. Damaged data is counted and never
// ends in a panic.
func (d *Decoder) Decode(f trace.Frame, into []trace.Sighting) []trace.Sighting {
	for b := f.Data; len(b) > 0; {
		if len(b) < recordLen {
			d.damaged.Add(1)
			return into
		}
		n := int(binary.BigEndian.Uint32(b))
		if n < recordLen || n > len(b) {
			d.damaged.Add(1)
			return into
		}
		s := trace.Sighting{Device: binary.BigEndian.Uint32(b[4:]), Time: int64(binary.BigEndian.Uint64(b[8:]))}
		packet := b[recordLen:n]
		b = b[n:]
		ok := false
		if len(packet) > etherLen {
			switch binary.BigEndian.Uint16(packet[12:]) {
			case etherIPv4, etherIPv6:
				s.Packet, ok = trace.ParseHeader(packet[etherLen:])
			}
		}
		if !ok {
			d.foreign.Add(1)
			continue
		}
		d.events.Add(1)
		into = append(into, s)
	}
	return into
}

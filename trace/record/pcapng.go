package record

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
)

// Block types and options of pcapng (IETF draft-ietf-opsawg-pcapng).
const (
	blockSection   = 0x0a0d0d0a
	blockInterface = 1
	blockPacket    = 6
	byteOrder      = 0x1a2b3c4d
	linkRaw        = 101 // LINKTYPE_RAW: packets begin with the IP header
	optComment     = 1
	optName        = 2
	optResolution  = 9
	optApplication = 4
	maxComment     = 1 << 15
)

// Pcapng writes packets with comments as Wireshark and tshark read them.
type Pcapng struct {
	w   *bufio.Writer
	err error
}

// NewPcapng begins a file. Packets are from one interface, which is a node.
func NewPcapng(w io.Writer, application, node string) *Pcapng {
	p := &Pcapng{w: bufio.NewWriter(w)}
	body := binary.LittleEndian.AppendUint32(nil, byteOrder)
	body = append(body, 1, 0, 0, 0) // version 1.0
	body = binary.LittleEndian.AppendUint64(body, 1<<64-1)
	p.block(blockSection, option(option(body, optApplication, application), 0, ""))
	body = append([]byte{linkRaw, 0, 0, 0}, 0, 0, 0, 0)
	body = option(body, optName, node)
	body = option(body, optResolution, "\x09") // nanoseconds
	p.block(blockInterface, option(body, 0, ""))
	return p
}

// Packet writes a packet: its time in nanoseconds since 1970, how long it was on
// the wire, as much of it as there is, and what is to be said of it.
func (p *Pcapng) Packet(time int64, length int, data []byte, comment string) {
	body := make([]byte, 0, 32+len(data)+len(comment))
	body = binary.LittleEndian.AppendUint32(body, 0)
	body = binary.LittleEndian.AppendUint32(body, uint32(uint64(time)>>32)) //nolint:gosec // the upper half
	body = binary.LittleEndian.AppendUint32(body, uint32(uint64(time)))     //nolint:gosec // the lower half
	body = binary.LittleEndian.AppendUint32(body, uint32(len(data)))        //nolint:gosec // a packet
	body = binary.LittleEndian.AppendUint32(body, uint32(max(length, len(data))))
	body = pad(append(body, data...))
	if comment != "" {
		body = option(option(body, optComment, comment[:min(len(comment), maxComment)]), 0, "")
	}
	p.block(blockPacket, body)
}

// Close ends the file and says what could not be written.
func (p *Pcapng) Close() error {
	if p.err == nil {
		p.err = p.w.Flush()
	}
	if p.err != nil {
		return fmt.Errorf("record: writing pcapng: %w", p.err)
	}
	return nil
}

func (p *Pcapng) block(kind uint32, body []byte) {
	if p.err != nil {
		return
	}
	length := uint32(len(body) + 12) //nolint:gosec // bounded by a packet and a comment
	b := binary.LittleEndian.AppendUint32(nil, kind)
	b = binary.LittleEndian.AppendUint32(b, length)
	b = append(b, body...)
	_, p.err = p.w.Write(binary.LittleEndian.AppendUint32(b, length))
}

// option appends an option; code 0 ends the list.
func option(b []byte, code uint16, value string) []byte {
	b = binary.LittleEndian.AppendUint16(b, code)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(value))) //nolint:gosec // bounded by maxComment
	return pad(append(b, value...))
}

func pad(b []byte) []byte {
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

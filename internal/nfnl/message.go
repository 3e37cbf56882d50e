package nfnl

import "encoding/binary"

// Messages iterates over the nfnetlink messages in what a socket returned,
// which may be several datagrams in a row. Messages of netlink itself (acks,
// ends of batches) are passed over. The header is in the byte order of the
// machine that read it.
//
//	for m := nfnl.NewMessages(data); m.Next(); {
//		m.Type, m.Attrs()
//	}
type Messages struct {
	// Type, Flags, Seq and PortID are the current message's header.
	Type, Flags uint16
	Seq, PortID uint32
	// Family and ResID are its nfgenmsg.
	Family uint8
	ResID  uint16

	attrs   []byte
	rest    []byte
	damaged bool
}

// NewMessages returns an iterator over data, which it refers to.
func NewMessages(data []byte) Messages { return Messages{rest: data} }

// CountMessages returns how many messages data holds.
func CountMessages(data []byte) (n uint64) {
	for m := NewMessages(data); m.Next(); {
		n++
	}
	return n
}

// Next goes to the next message and reports whether there is one.
func (m *Messages) Next() bool {
	for len(m.rest) > 0 {
		if len(m.rest) < HeaderLen {
			return m.fail()
		}
		n := int(binary.NativeEndian.Uint32(m.rest))
		if n < HeaderLen || n > len(m.rest) {
			return m.fail()
		}
		b := m.rest[:n]
		m.rest = m.rest[min(align(n), len(m.rest)):]
		m.Type = binary.NativeEndian.Uint16(b[4:])
		if m.Type < 0x100 {
			continue
		}
		if n < HeaderLen+GenHeaderLen {
			return m.fail()
		}
		m.Flags = binary.NativeEndian.Uint16(b[6:])
		m.Seq = binary.NativeEndian.Uint32(b[8:])
		m.PortID = binary.NativeEndian.Uint32(b[12:])
		m.Family = b[16]
		m.ResID = binary.BigEndian.Uint16(b[18:])
		m.attrs = b[HeaderLen+GenHeaderLen:]
		return true
	}
	return false
}

func (m *Messages) fail() bool {
	m.rest, m.damaged = nil, true
	return false
}

// Damaged reports whether the iteration ended before the data did, because a
// header made no sense.
func (m *Messages) Damaged() bool { return m.damaged }

// Attrs returns an iterator over the current message's attributes.
func (m *Messages) Attrs() Attrs { return Attrs{rest: m.attrs} }

// Attrs iterates over netlink attributes without allocating.
type Attrs struct {
	// Type is the current attribute's, without the flags for nesting and
	// byte order; Data is its payload.
	Type uint16
	Data []byte

	rest    []byte
	damaged bool
}

// NewAttrs returns an iterator over the attributes in data, such as the Data
// of a nested attribute.
func NewAttrs(data []byte) Attrs { return Attrs{rest: data} }

// Next goes to the next attribute and reports whether there is one.
func (a *Attrs) Next() bool {
	if len(a.rest) < attrLen {
		if len(a.rest) != 0 {
			a.rest, a.damaged = nil, true
		}
		return false
	}
	n := int(binary.NativeEndian.Uint16(a.rest))
	if n < attrLen || n > len(a.rest) {
		a.rest, a.damaged = nil, true
		return false
	}
	a.Type = binary.NativeEndian.Uint16(a.rest[2:]) & 0x3fff
	a.Data = a.rest[attrLen:n]
	a.rest = a.rest[min(align(n), len(a.rest)):]
	return true
}

// Damaged reports whether the iteration ended before the data did.
func (a *Attrs) Damaged() bool { return a.damaged }

// Uint8 returns the payload as a number, zero where it is too short.
func (a *Attrs) Uint8() uint8 {
	if len(a.Data) < 1 {
		return 0
	}
	return a.Data[0]
}

// Uint16 returns a big-endian payload, zero where it is too short.
func (a *Attrs) Uint16() uint16 {
	if len(a.Data) < 2 {
		return 0
	}
	return binary.BigEndian.Uint16(a.Data)
}

// Uint32 returns a big-endian payload, zero where it is too short.
func (a *Attrs) Uint32() uint32 {
	if len(a.Data) < 4 {
		return 0
	}
	return binary.BigEndian.Uint32(a.Data)
}

// Uint64 returns a big-endian payload, zero where it is too short.
func (a *Attrs) Uint64() uint64 {
	if len(a.Data) < 8 {
		return 0
	}
	return binary.BigEndian.Uint64(a.Data)
}

// AppendMessage appends a complete nfnetlink message to b: the two headers
// and attrs, which AppendAttr made.
func AppendMessage(b []byte, typ, flags uint16, seq uint32, family uint8, resID uint16, attrs []byte) []byte {
	b = binary.NativeEndian.AppendUint32(b, uint32(HeaderLen+GenHeaderLen+len(attrs)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = append(b, 0, 0, 0, 0, family, 0)
	b = binary.BigEndian.AppendUint16(b, resID)
	return append(b, attrs...)
}

// AppendAttr appends one attribute and its padding to b.
func AppendAttr(b []byte, typ uint16, data ...byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(attrLen+len(data)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, data...)
	return append(b, make([]byte, align(len(data))-len(data))...)
}

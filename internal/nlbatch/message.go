package nlbatch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"syscall"
)

// Flags of a request (linux/netlink.h).
const (
	FlagRequest = 0x1
	FlagAck     = 0x4
	FlagReplace = 0x100
	FlagExcl    = 0x200
	FlagCreate  = 0x400
)

const (
	headerLen = 16
	typeError = 2 // NLMSG_ERROR, also the acknowledgement
)

// Message is one request. Body is what stands behind the netlink header.
type Message struct {
	Type, Flags uint16
	Body        []byte
}

// Attr appends an attribute to b.
func Attr(b []byte, typ uint16, data ...byte) []byte {
	n := 4 + len(data)
	if n > math.MaxUint16 {
		panic(fmt.Sprintf("nlbatch: an attribute of %d bytes", n)) // ours have a few
	}
	b = binary.NativeEndian.AppendUint16(b, uint16(n)) //nolint:gosec // checked above
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, data...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// Uint16 appends a 16-bit attribute in the machine's byte order.
func Uint16(b []byte, typ, v uint16) []byte {
	return Attr(b, typ, binary.NativeEndian.AppendUint16(nil, v)...)
}

// Uint32 appends a 32-bit attribute in the machine's byte order.
func Uint32(b []byte, typ uint16, v uint32) []byte {
	return Attr(b, typ, binary.NativeEndian.AppendUint32(nil, v)...)
}

// String appends a string with its NUL.
func String(b []byte, typ uint16, s string) []byte {
	return Attr(b, typ, append([]byte(s), 0)...)
}

// Nested marks an attribute that holds others, NetOrder one in network byte
// order (linux/netlink.h).
const (
	Nested   = 1 << 15
	NetOrder = 1 << 14
)

// Nest appends an attribute that holds what f appends.
func Nest(b []byte, typ uint16, f func([]byte) []byte) []byte {
	at := len(b)
	b = f(append(b, 0, 0, 0, 0))
	binary.NativeEndian.PutUint16(b[at:], uint16(len(b)-at)) //nolint:gosec // a few hundred bytes
	binary.NativeEndian.PutUint16(b[at+2:], typ|Nested)
	return b
}

// append writes the message with its header.
func (m *Message) append(b []byte, seq uint32, ack bool) []byte {
	flags := m.Flags | FlagRequest
	if ack {
		flags |= FlagAck
	}
	b = binary.NativeEndian.AppendUint32(b, uint32(headerLen+len(m.Body))) //nolint:gosec // a few hundred bytes
	b = binary.NativeEndian.AppendUint16(b, m.Type)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = append(b, m.Body...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

var errDamaged = errors.New("the kernel's answer is damaged")

// answers calls f for every acknowledgement in a datagram; errno is zero for
// success.
func answers(b []byte, f func(seq uint32, errno syscall.Errno)) error {
	for len(b) > 0 {
		if len(b) < headerLen {
			return errDamaged
		}
		n := int(binary.NativeEndian.Uint32(b))
		if n < headerLen || n > len(b) {
			return errDamaged
		}
		if binary.NativeEndian.Uint16(b[4:]) == typeError {
			if n < headerLen+4 {
				return errDamaged
			}
			code := int32(binary.NativeEndian.Uint32(b[headerLen:])) //nolint:gosec // it is signed there
			f(binary.NativeEndian.Uint32(b[8:]), syscall.Errno(-code))
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return nil
}

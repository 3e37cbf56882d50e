package trace

import (
	"crypto/sha256"
	"encoding/binary"
)

// TraceID is a Flow's id for tracing systems, as W3C Trace Context has it:
// 16 bytes, never all zero. It is the first half of the SHA-256 of the node's
// name, a zero byte and the Flow's ID (8 bytes, big endian): every exporter
// gives the same one, in every revision, and its bits are as good as random,
// as samplers that look at them need.
type TraceID [16]byte //nolint:revive // W3C's word; there are FlowID and SpanID too

// TraceID returns the id of the trace that tells of f: the application's where
// the connection's first request named one that is recorded (see Parent), else
// one of the Flow's own. It allocates nothing for node names of up to 64 bytes.
func (f *Flow) TraceID() TraceID { return f.SpanContext().Trace }

// derive makes the ids of f's own.
func (f *Flow) derive() (TraceID, SpanID) {
	var room [80]byte
	b := append(room[:0], f.Node...)
	b = append(b, 0)
	b = binary.BigEndian.AppendUint64(b, uint64(f.ID))
	sum := sha256.Sum256(b)
	return TraceID(sum[:16]), SpanID(sum[16:24])
}

// String returns the id as 32 lower case hexadecimal digits.
func (t TraceID) String() string {
	var hex [32]byte
	const digits = "0123456789abcdef"
	for i, b := range t {
		hex[2*i], hex[2*i+1] = digits[b>>4], digits[b&15]
	}
	return string(hex[:])
}

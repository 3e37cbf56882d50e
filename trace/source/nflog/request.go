package nflog

import (
	"bytes"
	"encoding/binary"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// ParseRequest finds the traceparent header of an HTTP/1 request in a packet,
// given from its IP header on and perhaps cut off. It looks at the request's
// head only, and only if the packet begins it. The tuple is the packet's.
func ParseRequest(b []byte) (conntrack.Tuple, trace.SpanContext, bool) {
	var none trace.SpanContext
	p, ok := parseIP(b)
	if !ok || p.proto != conntrack.TCP || p.later || len(p.payload) < 20 {
		return conntrack.Tuple{}, none, false
	}
	be := binary.BigEndian
	var t conntrack.Tuple
	sport, dport := be.Uint16(p.payload), be.Uint16(p.payload[2:])
	if len(p.src) == 4 {
		t = conntrack.TupleOf4(p.proto, p.src, p.dst, sport, dport)
	} else {
		t = conntrack.TupleOf6(p.proto, p.src, p.dst, sport, dport)
	}
	head := int(p.payload[12]>>4) * 4
	if head < 20 || head > len(p.payload) {
		return t, none, false
	}
	value, ok := traceparent(p.payload[head:])
	if !ok {
		return t, none, false
	}
	c, err := trace.ParseTraceparent(value)
	return t, c, err == nil
}

// traceparent finds the value of the header in data that begins with an HTTP/1
// request (RFC 9112, sections 3 and 5).
func traceparent(data []byte) (string, bool) {
	line, rest, ok := bytes.Cut(data, []byte("\r\n"))
	if !ok || !requestLine(line) {
		return "", false
	}
	for {
		line, rest, ok = bytes.Cut(rest, []byte("\r\n"))
		if !ok || len(line) == 0 {
			return "", false // cut off, or the end of the head
		}
		name, value, colon := bytes.Cut(line, []byte(":"))
		if colon && bytes.EqualFold(name, []byte("traceparent")) {
			return string(bytes.Trim(value, " \t")), true
		}
	}
}

// requestLine reports whether a line is METHOD TARGET HTTP/1.x.
func requestLine(line []byte) bool {
	method, rest, ok := bytes.Cut(line, []byte(" "))
	if !ok || len(method) == 0 || len(method) > 32 {
		return false
	}
	for _, c := range method {
		if (c < 'A' || c > 'Z') && c != '-' && c != '_' {
			return false
		}
	}
	i := bytes.LastIndexByte(rest, ' ')
	return i > 0 && bytes.HasPrefix(rest[i+1:], []byte("HTTP/1."))
}

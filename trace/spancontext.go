package trace

import (
	"encoding/hex"
	"fmt"
	"strings"
	"time"
)

// SpanID names one span of a trace, as W3C Trace Context has it: 8 bytes, never
// all zero.
type SpanID [8]byte

// String returns 16 lower-case hexadecimal digits.
func (id SpanID) String() string { return hex.EncodeToString(id[:]) }

// FlagSampled in SpanContext.Flags says that the caller may have recorded its
// span.
const FlagSampled = 1

// SpanContext is what a traceparent header says: the span that sent a request.
type SpanContext struct {
	Trace TraceID
	Span  SpanID
	Flags byte
}

// Sampled reports whether the span may have been recorded.
func (s SpanContext) Sampled() bool { return s.Flags&FlagSampled != 0 }

// ParseTraceparent reads the value of a traceparent header (W3C Trace Context,
// section 3.2). Of versions after 00 it reads what version 00 has, as the
// specification asks.
func ParseTraceparent(s string) (SpanContext, error) {
	var c SpanContext
	const size = len("00-0123456789abcdef0123456789abcdef-0123456789abcdef-00")
	bad := func(why string) (SpanContext, error) {
		return SpanContext{}, fmt.Errorf("trace: traceparent %.60q: %s", s, why)
	}
	switch {
	case len(s) < size:
		return bad("too short")
	case s[2] != '-' || s[35] != '-' || s[52] != '-':
		return bad("no dashes where they belong")
	case strings.ToLower(s[:size]) != s[:size]:
		return bad("upper case")
	case s[:2] == "ff":
		return bad("version ff is not valid")
	case s[:2] == "00" && len(s) > size, len(s) > size && s[size] != '-':
		return bad("too long")
	}
	var version, flags [1]byte
	for _, part := range []struct {
		to   []byte
		text string
	}{{version[:], s[:2]}, {c.Trace[:], s[3:35]}, {c.Span[:], s[36:52]}, {flags[:], s[53:55]}} {
		if _, err := hex.Decode(part.to, []byte(part.text)); err != nil {
			return bad("not hexadecimal")
		}
	}
	if c.Trace == (TraceID{}) || c.Span == (SpanID{}) {
		return bad("an id of zeros")
	}
	c.Flags = flags[0]
	return c, nil
}

// Carried is a request on a connection that named the span which sent it.
type Carried struct {
	// Time is when the packet with the header passed.
	Time time.Time
	SpanContext
}

// MaxCarried bounds Flow.Carried. It is OpenTelemetry's default limit of links.
const MaxCarried = 128

// SpanContext returns the trace that the connection's span is part of, and the
// span's id. Both follow from the Flow: whoever exports spans and whoever
// shows exemplars agree without asking each other. It is the trace of the
// application if the connection's first request named one that is recorded;
// else one of the connection's own.
func (f *Flow) SpanContext() SpanContext {
	var c SpanContext
	c.Trace, c.Span = f.derive()
	if p, ok := f.Parent(); ok {
		c.Trace, c.Flags = p.Trace, p.Flags
	}
	return c
}

// Parent returns the span of the application that the connection's span is a
// child of: that of the first request, if it is recorded.
func (f *Flow) Parent() (SpanContext, bool) {
	if len(f.Carried) == 0 || !f.Carried[0].Sampled() {
		return SpanContext{}, false
	}
	return f.Carried[0].SpanContext, true
}

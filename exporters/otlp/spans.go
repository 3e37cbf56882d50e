package otlp

import (
	"encoding/binary"
	"time"

	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/kptrace/kptrace/trace"
)

// scope is the instrumentation scope of all we export.
const scope = "github.com/kptrace/kptrace"

// The names of spans and events.
const (
	spanConnection  = "connection"
	spanDecision    = "decision"
	spanAttempt     = "attempt"
	spanEstablished = "established"

	eventAffinity   = "affinity"
	eventRetransmit = "retransmit"
	eventState      = "state"
)

// spanMaker makes spans of Flows in the form in which they are sent. To make them
// with OpenTelemetry's SDK, whose spans are those of a running program, costs
// thrice as much. It has one user at a time.
type spanMaker struct {
	resource *resourcepb.Resource
	scope    *commonpb.InstrumentationScope
	schema   string // of the resource
	limits   sdktrace.SpanLimits
	room     attrs // for those of one span
	list     []*tracepb.Span

	// Of the connection at hand.
	trace []byte
	root  []byte
	ids   spanIDs

	spans  pieces[tracepb.Span]
	events pieces[tracepb.Span_Event]
	spanID pieces[[8]byte]
	values valueMaker
}

func newSpanMaker(res *resource.Resource, version string) *spanMaker {
	m := &spanMaker{
		scope:  &commonpb.InstrumentationScope{Name: scope, Version: version},
		schema: res.SchemaURL(), limits: sdktrace.NewSpanLimits(),
	}
	m.values.length = m.limits.AttributeValueLengthLimit
	of := valueMaker{length: -1}
	m.resource = &resourcepb.Resource{}
	m.resource.Attributes, _ = of.some(nil, res.Attributes(), -1)
	return m
}

// spanIDs hands out the ids of one connection's spans: the Flow's own for the
// first, and for each further one what follows from it.
type spanIDs struct {
	own trace.SpanID
	n   uint64
}

func (g *spanIDs) next(id *[8]byte) {
	const step = 0x9e3779b97f4a7c15 // odd, so that it takes 2^64 steps to come back
	n := binary.BigEndian.Uint64(g.own[:]) + g.n*step
	if g.n++; n == 0 {
		n = step
	}
	binary.BigEndian.PutUint64(id[:], n)
}

// request makes the spans of some Flows, and says how many they are. now is
// when they are exported, which is when a connection that was given up ends. All
// of it lasts until the next request is made.
func (m *spanMaker) request(flows []*trace.Flow, now time.Time) ([]*tracepb.ResourceSpans, int) {
	m.list = m.list[:0]
	m.spans.rewind()
	m.events.rewind()
	m.spanID.rewind()
	m.values.rewind()
	for _, f := range flows {
		m.add(f, now)
	}
	return []*tracepb.ResourceSpans{{
		Resource: m.resource, SchemaUrl: m.schema,
		ScopeSpans: []*tracepb.ScopeSpans{{Scope: m.scope, SchemaUrl: semconv.SchemaURL, Spans: m.list}},
	}}, len(m.list)
}

// span adds a span of the connection at hand, with what a holds, to the list.
func (m *spanMaker) span(name string, kind tracepb.Span_SpanKind, start, end time.Time, a attrs) *tracepb.Span {
	s, id := m.spans.next(), m.spanID.next()
	m.ids.next(id)
	list, events := s.Attributes, s.Events
	s.Reset()
	s.Events = events[:0]
	s.Name, s.Kind, s.TraceId, s.SpanId, s.ParentSpanId = name, kind, m.trace, id[:], m.root
	s.StartTimeUnixNano, s.EndTimeUnixNano = nanos(start), nanos(end)
	s.Flags = uint32(trace.FlagSampled) | uint32(tracepb.SpanFlags_SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK)
	s.Attributes, s.DroppedAttributesCount = m.values.some(list, a, m.limits.AttributeCountLimit)
	m.list = append(m.list, s)
	return s
}

// event adds an event to a span; where there is no room the oldest goes.
func (m *spanMaker) event(s *tracepb.Span, name string, at time.Time, a attrs) {
	e := m.events.next()
	e.Name, e.TimeUnixNano = name, nanos(at)
	e.Attributes, e.DroppedAttributesCount = m.values.some(e.Attributes, a, m.limits.AttributePerEventCountLimit)
	s.Events = append(s.Events, e)
	if n := m.limits.EventCountLimit; n >= 0 && len(s.Events) > n {
		s.Events = s.Events[1:]
		s.DroppedEventsCount++
	}
}

func nanos(t time.Time) uint64 { return uint64(max(0, t.UnixNano())) }

func fail(s *tracepb.Span, why string) {
	s.Status = &tracepb.Status{Code: tracepb.Status_STATUS_CODE_ERROR, Message: why}
}

// add makes the spans of one Flow: the connection, and as its children the
// decision, each attempt, and the time from the answer to the end.
func (m *spanMaker) add(f *trace.Flow, now time.Time) {
	own := f.SpanContext()
	parent, joined := f.Parent()
	m.ids, m.trace, m.root = spanIDs{own: own.Span}, own.Trace[:], nil
	end := endOf(f, now)
	a := m.room[:0]
	a.connection(f)
	m.room = a
	root := m.span(connectionName(f), tracepb.Span_SPAN_KIND_CLIENT, f.Start, end, a)
	m.root = root.GetSpanId()
	if joined {
		root.ParentSpanId = parent.Span[:]
		root.Flags |= uint32(tracepb.SpanFlags_SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK)
	}
	m.links(root, f, joined)
	state := func(word string, at time.Time) {
		m.event(root, eventState, at, attrs{semconv.NetworkConnectionStateKey.String(word)})
	}
	if f.Decision.Known {
		m.decision(f)
	}
	for i := range f.Attempts {
		m.attempt(f, i, end)
	}
	if f.Established >= 0 {
		at := f.Start.Add(f.Established)
		state("established", at)
		if end.After(at) || f.Duration >= f.Established {
			m.span(spanEstablished, tracepb.Span_SPAN_KIND_INTERNAL, at, end, nil)
		}
	}
	state(string(f.Outcome), end)
	if failed(f) {
		fail(root, statusText(f))
	}
}

// connectionName names the Service, of which there are few, and no address.
func connectionName(f *trace.Flow) string {
	n := &f.Service.Name
	if n.Name == "" {
		return spanConnection
	}
	return spanConnection + " " + n.Namespace + "/" + n.Name
}

// endOf is when a connection ended: where that is not known, but the last thing
// that happened is, that; for one given up it is now.
func endOf(f *trace.Flow, now time.Time) time.Time {
	if f.Duration >= 0 {
		return f.Start.Add(f.Duration)
	}
	end := f.Start
	if f.Outcome == trace.Timeout || f.Outcome == trace.Unknown {
		end = now
	}
	later := func(t time.Time) {
		if t.After(end) {
			end = t
		}
	}
	if f.Established > 0 {
		later(f.Start.Add(f.Established))
	}
	for i := range f.Attempts {
		a := &f.Attempts[i]
		later(a.Start.Add(max(a.Latency, a.Resent)))
	}
	return end
}

func statusText(f *trace.Flow) string {
	if f.Reason == trace.NoReason {
		return string(f.Outcome)
	}
	return string(f.Outcome) + ": " + string(f.Reason)
}

// links leads to the requests that are no parent; where there is no room the
// oldest go.
func (m *spanMaker) links(s *tracepb.Span, f *trace.Flow, joined bool) {
	list := f.Carried
	if joined {
		list = list[1:]
	}
	if n := m.limits.LinkCountLimit; n >= 0 && len(list) > n {
		s.DroppedLinksCount = uint32(len(list) - n)
		list = list[len(list)-n:]
	}
	for i := range list {
		c := &list[i]
		l := &tracepb.Span_Link{
			TraceId: c.Trace[:], SpanId: c.Span[:],
			Flags: uint32(c.Flags) | uint32(tracepb.SpanFlags_SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK|tracepb.SpanFlags_SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK),
		}
		l.Attributes, l.DroppedAttributesCount = m.values.some(nil,
			attrs{keyRequestTime.String(c.Time.UTC().Format(time.RFC3339Nano))}, m.limits.AttributePerLinkCountLimit)
		s.Links = append(s.Links, l)
	}
}

// decision is a span of no length: the kernel decides within one packet's walk.
func (m *spanMaker) decision(f *trace.Flow) {
	a := m.room[:0]
	a.decision(&f.Decision)
	s := m.span(spanDecision, tracepb.Span_SPAN_KIND_INTERNAL, f.Start, f.Start, a)
	if d := &f.Decision; d.Affinity != "" && d.Affinity != trace.AffinityNone {
		a = a[:0]
		a.affinity(d)
		m.event(s, eventAffinity, f.Start, a)
	}
}

// attempt lasts until its answer, until the next attempt, or to the end.
func (m *spanMaker) attempt(f *trace.Flow, i int, end time.Time) {
	t := &f.Attempts[i]
	switch {
	case t.Latency >= 0:
		end = t.Start.Add(t.Latency)
	case i+1 < len(f.Attempts):
		end = f.Attempts[i+1].Start
	}
	a := m.room[:0]
	a.add(keyAttempt.Int(i+1), keyAttemptOutcome.String(t.Outcome))
	a.destination(&t.Endpoint)
	a.count(keyRetransmits, t.Retransmits)
	a.text(keyICMP, t.ICMP)
	a.text(keyReason, string(t.Reason))
	s := m.span(spanAttempt, tracepb.Span_SPAN_KIND_CLIENT, t.Start, end, a)
	if t.Retransmits > 0 {
		m.event(s, eventRetransmit, t.Start.Add(t.Resent), attrs{keyRetransmits.Int(t.Retransmits)})
	}
	switch t.Outcome {
	case "refused", "unreachable", "unanswered", "timeout":
		fail(s, t.Outcome)
	case "reset":
		if f.Reason != trace.ResetByClient {
			fail(s, t.Outcome)
		}
	}
}

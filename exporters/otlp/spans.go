package otlp

import (
	"context"
	"encoding/binary"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	oteltrace "go.opentelemetry.io/otel/trace"

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

// spanMaker makes spans of Flows with OpenTelemetry's SDK, which sees to the
// limits that the environment sets. It has one user at a time.
type spanMaker struct {
	provider *sdktrace.TracerProvider
	tracer   oteltrace.Tracer
	made     []sdktrace.ReadOnlySpan
	ids      idMaker
	room     attrs // for those of one span: the SDK copies them
}

func newSpanMaker(res *resource.Resource, version string) *spanMaker {
	m := &spanMaker{}
	m.provider = sdktrace.NewTracerProvider(
		sdktrace.WithResource(res), sdktrace.WithSampler(sdktrace.AlwaysSample()),
		sdktrace.WithIDGenerator(&m.ids), sdktrace.WithSpanProcessor(collect{m}),
	)
	m.tracer = m.provider.Tracer(scope, oteltrace.WithInstrumentationVersion(version), oteltrace.WithSchemaURL(semconv.SchemaURL))
	return m
}

// collect is the processor that keeps the spans that ended.
type collect struct{ m *spanMaker }

func (collect) OnStart(context.Context, sdktrace.ReadWriteSpan) {}
func (c collect) OnEnd(s sdktrace.ReadOnlySpan)                 { c.m.made = append(c.m.made, s) }
func (collect) Shutdown(context.Context) error                  { return nil }
func (collect) ForceFlush(context.Context) error                { return nil }

// idMaker hands out the ids of one connection: the Flow's own for its span,
// and for each further one what follows from it.
type idMaker struct {
	own trace.SpanContext
	n   uint64
}

func (g *idMaker) NewIDs(ctx context.Context) (oteltrace.TraceID, oteltrace.SpanID) {
	return oteltrace.TraceID(g.own.Trace), g.NewSpanID(ctx, oteltrace.TraceID(g.own.Trace))
}

func (g *idMaker) NewSpanID(context.Context, oteltrace.TraceID) (id oteltrace.SpanID) {
	const step = 0x9e3779b97f4a7c15 // odd, so that it takes 2^64 steps to come back
	n := binary.BigEndian.Uint64(g.own.Span[:]) + g.n*step
	if g.n++; n == 0 {
		n = step
	}
	binary.BigEndian.PutUint64(id[:], n)
	return id
}

// spans makes the spans of some Flows. now is when they are exported, which is
// when a connection that was given up ends.
func (m *spanMaker) spans(flows []*trace.Flow, now time.Time) []sdktrace.ReadOnlySpan {
	m.made = m.made[:0]
	for _, f := range flows {
		m.add(f, now)
	}
	return m.made
}

func spanContext(c trace.SpanContext) oteltrace.SpanContext {
	return oteltrace.NewSpanContext(oteltrace.SpanContextConfig{
		TraceID: oteltrace.TraceID(c.Trace), SpanID: oteltrace.SpanID(c.Span),
		TraceFlags: oteltrace.TraceFlags(c.Flags), Remote: true,
	})
}

// add makes the spans of one Flow: the connection, and as its children the
// decision, each attempt, and the time from the answer to the end.
func (m *spanMaker) add(f *trace.Flow, now time.Time) {
	m.ids = idMaker{own: f.SpanContext()}
	ctx := context.Background()
	parent, joined := f.Parent()
	if joined {
		ctx = oteltrace.ContextWithRemoteSpanContext(ctx, spanContext(parent))
	}
	end := endOf(f, now)
	a := m.room[:0]
	a.connection(f)
	m.room = a
	ctx, root := m.tracer.Start(ctx, connectionName(f), oteltrace.WithTimestamp(f.Start),
		oteltrace.WithSpanKind(oteltrace.SpanKindClient), oteltrace.WithAttributes(a...),
		oteltrace.WithLinks(links(f, joined)...))
	state := func(word string, at time.Time) {
		root.AddEvent(eventState, oteltrace.WithTimestamp(at), oteltrace.WithAttributes(semconv.NetworkConnectionStateKey.String(word)))
	}
	if f.Decision.Known {
		m.decision(ctx, f)
	}
	for i := range f.Attempts {
		m.attempt(ctx, f, i, end)
	}
	if f.Established >= 0 {
		at := f.Start.Add(f.Established)
		state("established", at)
		if end.After(at) || f.Duration >= f.Established {
			_, s := m.tracer.Start(ctx, spanEstablished, oteltrace.WithTimestamp(at))
			s.End(oteltrace.WithTimestamp(end))
		}
	}
	state(string(f.Outcome), end)
	if failed(f) {
		root.SetStatus(codes.Error, statusText(f))
	}
	root.End(oteltrace.WithTimestamp(end))
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

// links leads to the requests that are no parent.
func links(f *trace.Flow, joined bool) []oteltrace.Link {
	list := f.Carried
	if joined {
		list = list[1:]
	}
	var out []oteltrace.Link
	for i := range list {
		out = append(out, oteltrace.Link{
			SpanContext: spanContext(list[i].SpanContext),
			Attributes:  []attribute.KeyValue{keyRequestTime.String(list[i].Time.UTC().Format(time.RFC3339Nano))},
		})
	}
	return out
}

// decision is a span of no length: the kernel decides within one packet's walk.
func (m *spanMaker) decision(ctx context.Context, f *trace.Flow) {
	a := m.room[:0]
	a.decision(&f.Decision)
	_, s := m.tracer.Start(ctx, spanDecision, oteltrace.WithTimestamp(f.Start), oteltrace.WithAttributes(a...))
	if d := &f.Decision; d.Affinity != "" && d.Affinity != trace.AffinityNone {
		var a attrs
		a.affinity(d)
		s.AddEvent(eventAffinity, oteltrace.WithTimestamp(f.Start), oteltrace.WithAttributes(a...))
	}
	s.End(oteltrace.WithTimestamp(f.Start))
}

// attempt lasts until its answer, until the next attempt, or to the end.
func (m *spanMaker) attempt(ctx context.Context, f *trace.Flow, i int, end time.Time) {
	t := &f.Attempts[i]
	switch {
	case t.Latency >= 0:
		end = t.Start.Add(t.Latency)
	case i+1 < len(f.Attempts):
		end = f.Attempts[i+1].Start
	}
	a := m.room[:0]
	a.add(keyAttempt.Int(i+1), keyAttemptOutcome.String(t.Outcome))
	a.peer("destination", &t.Endpoint)
	a.count(keyRetransmits, t.Retransmits)
	a.text(keyICMP, t.ICMP)
	_, s := m.tracer.Start(ctx, spanAttempt, oteltrace.WithTimestamp(t.Start),
		oteltrace.WithSpanKind(oteltrace.SpanKindClient), oteltrace.WithAttributes(a...))
	if t.Retransmits > 0 {
		s.AddEvent(eventRetransmit, oteltrace.WithTimestamp(t.Start.Add(t.Resent)),
			oteltrace.WithAttributes(keyRetransmits.Int(t.Retransmits)))
	}
	switch t.Outcome {
	case "refused", "unreachable", "unanswered", "timeout":
		s.SetStatus(codes.Error, t.Outcome)
	case "reset":
		if f.Reason != trace.ResetByClient {
			s.SetStatus(codes.Error, t.Outcome)
		}
	}
	s.End(oteltrace.WithTimestamp(end))
}

package otlp

import (
	"context"
	"fmt"
	"time"

	"go.opentelemetry.io/otel/attribute"
	otellog "go.opentelemetry.io/otel/log"
	sdklog "go.opentelemetry.io/otel/sdk/log"
	"go.opentelemetry.io/otel/sdk/resource"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	oteltrace "go.opentelemetry.io/otel/trace"

	"github.com/kptrace/kptrace/trace"
)

// eventConnection is the event name of the log record of a connection.
const eventConnection = "kptrace.connection"

// logMaker makes log records of Flows. It has one user at a time.
type logMaker struct {
	logger   otellog.Logger
	sampling Sampling
	made     []sdklog.Record
}

func newLogMaker(res *resource.Resource, version string, s Sampling) *logMaker {
	m := &logMaker{sampling: s}
	m.logger = sdklog.NewLoggerProvider(sdklog.WithResource(res), sdklog.WithProcessor(keep{m})).
		Logger(scope, otellog.WithInstrumentationVersion(version), otellog.WithSchemaURL(semconv.SchemaURL))
	return m
}

// keep is the processor that keeps the records.
type keep struct{ m *logMaker }

func (k keep) OnEmit(_ context.Context, r *sdklog.Record) error {
	k.m.made = append(k.m.made, r.Clone())
	return nil
}
func (keep) Enabled(context.Context, sdklog.EnabledParameters) bool { return true }
func (keep) Shutdown(context.Context) error                         { return nil }
func (keep) ForceFlush(context.Context) error                       { return nil }

// records makes one record for each Flow: with the attributes of the
// connection's span and of its decision, and the ids of that span if it is
// exported.
func (m *logMaker) records(flows []*trace.Flow, now time.Time) []sdklog.Record {
	m.made = m.made[:0]
	for _, f := range flows {
		var a attrs
		a.connection(f)
		known := map[attribute.Key]bool{}
		for _, kv := range a {
			known[kv.Key] = true
		}
		var d attrs
		if f.Decision.Known {
			d.decision(&f.Decision)
		}
		for _, kv := range d {
			if !known[kv.Key] {
				a.add(kv)
			}
		}
		var r otellog.Record
		r.SetEventName(eventConnection)
		r.SetTimestamp(endOf(f, now))
		r.SetObservedTimestamp(now)
		r.SetSeverity(otellog.SeverityInfo)
		if failed(f) {
			r.SetSeverity(otellog.SeverityWarn)
		}
		r.SetSeverityText(r.Severity().String())
		r.SetBody(attribute.StringValue(body(f)))
		r.AddAttributes(a...)
		ctx := context.Background()
		if m.sampling.Keep(f) {
			c := f.SpanContext()
			c.Flags |= trace.FlagSampled
			ctx = oteltrace.ContextWithSpanContext(ctx, oteltrace.NewSpanContext(oteltrace.SpanContextConfig{
				TraceID: oteltrace.TraceID(c.Trace), SpanID: oteltrace.SpanID(c.Span), TraceFlags: oteltrace.TraceFlags(c.Flags),
			}))
		}
		m.logger.Emit(ctx, r)
	}
	return m.made
}

// body is the record in one line.
func body(f *trace.Flow) string {
	s := fmt.Sprintf("%s > %s/%s", f.Client.Addr, f.Service.Name.Namespace, f.Service.Name.Name)
	if f.Backend.Addr.IsValid() {
		s += " > " + f.Backend.Addr.String()
	}
	return s + " " + statusText(f)
}

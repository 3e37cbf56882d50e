package otlp

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/kptrace/kptrace/trace"
)

// export sends flows to a receiver and returns it when all have arrived.
func export(t *testing.T, cfg Config, r *receiver, flows ...*trace.Flow) Stats {
	t.Helper()
	cfg.Logs.Off = cfg.Logs.Off || cfg.Logs == Signal{}
	cfg.Traces.Delay = 10 * ms
	e, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	ring := trace.NewRing(1 << 10)
	reader := ring.NewReader()
	for _, f := range flows {
		ring.Publish(f)
	}
	ring.Close()
	if err := e.Run(context.Background(), reader); err != nil {
		t.Fatal(err)
	}
	return e.Stats()
}

// one exports a Flow and returns its spans by name.
func one(t *testing.T, f *trace.Flow) map[string][]*tracepb.Span {
	t.Helper()
	r := newReceiver()
	endpoint, _ := r.serveGRPC(t, "127.0.0.1:0", nil)
	export(t, Config{Endpoint: endpoint, Traces: Signal{Protocol: GRPC}, Sampling: Sampling{Ratio: 1}}, r, f)
	out := map[string][]*tracepb.Span{}
	for _, s := range r.got() {
		name, _, _ := strings.Cut(s.GetName(), " ")
		out[name] = append(out[name], s)
	}
	if len(out[spanConnection]) != 1 {
		t.Fatalf("spans %v", out)
	}
	return out
}

func at(ns uint64) time.Duration { return time.Unix(0, int64(ns)).Sub(start) }

// text writes attributes as "key=value".
func text(kvs []*commonpb.KeyValue) []string {
	var out []string
	for _, kv := range kvs {
		var v any
		switch x := kv.GetValue().GetValue().(type) {
		case *commonpb.AnyValue_StringValue:
			v = x.StringValue
		case *commonpb.AnyValue_IntValue:
			v = x.IntValue
		case *commonpb.AnyValue_DoubleValue:
			v = fmt.Sprintf("%.4g", x.DoubleValue)
		case *commonpb.AnyValue_BoolValue:
			v = x.BoolValue
		case *commonpb.AnyValue_ArrayValue:
			var list []string
			for _, e := range x.ArrayValue.GetValues() {
				list = append(list, e.GetStringValue())
			}
			v = strings.Join(list, ",")
		}
		out = append(out, fmt.Sprintf("%s=%v", kv.GetKey(), v))
	}
	slices.Sort(out)
	return out
}

func want(t *testing.T, what string, got, want []string) {
	t.Helper()
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%s:\n got %s\nwant %s", what, strings.Join(got, "\n     "), strings.Join(want, "\n     "))
	}
}

// TestSpans holds every time, kind, id, event, status and attribute of a
// connection that went well, as the collector gets them.
func TestSpans(t *testing.T) {
	f := good()
	spans := one(t, f)
	root := spans[spanConnection][0]
	ids := f.SpanContext()
	switch {
	case root.GetName() != "connection shop/foo", root.GetKind() != tracepb.Span_SPAN_KIND_CLIENT,
		len(root.GetParentSpanId()) != 0, root.GetStatus().GetCode() != tracepb.Status_STATUS_CODE_UNSET,
		at(root.GetStartTimeUnixNano()) != 0, at(root.GetEndTimeUnixNano()) != 32*ms,
		hex.EncodeToString(root.GetTraceId()) != f.TraceID().String(),
		hex.EncodeToString(root.GetSpanId()) != ids.Span.String():
		t.Errorf("connection: %v", root)
	}
	want(t, "connection", text(root.GetAttributes()), []string{
		"kptrace.flow.id=0000000000007", "kptrace.outcome=closed", "network.transport=tcp", "network.type=ipv4",
		"source.address=10.244.1.5", "source.port=40312", "source.k8s.namespace.name=shop", "source.k8s.pod.name=web-7f9",
		"source.k8s.node.name=node1", "source.k8s.deployment.name=web",
		"network.peer.address=10.96.0.10", "network.peer.port=80",
		"destination.address=10.244.2.7", "destination.port=8080", "destination.k8s.namespace.name=shop",
		"destination.k8s.pod.name=foo-5c", "destination.k8s.node.name=node2", "destination.k8s.statefulset.name=foo",
		"kptrace.nat.source.address=10.244.1.1", "kptrace.nat.source.port=61000",
		"k8s.namespace.name=shop", "k8s.service.name=foo", "kptrace.service.port.name=http", "kptrace.service.via=ClusterIP",
		"kptrace.mode=iptables", "kptrace.affinity=hit", "kptrace.time_to_establish=0.0008",
		"kptrace.out.bytes=4100", "kptrace.out.packets=12", "kptrace.in.bytes=18000", "kptrace.in.packets=9",
		"kptrace.evidence=nflog,conntrack",
	})
	var events []string
	for _, e := range root.GetEvents() {
		events = append(events, fmt.Sprintf("%v %s %v", at(e.GetTimeUnixNano()), e.GetName(), text(e.GetAttributes())))
	}
	if w := []string{
		"800µs state [network.connection.state=established]", "32ms state [network.connection.state=closed]",
	}; !slices.Equal(events, w) {
		t.Errorf("events %v, want %v", events, w)
	}
	decision, attempt, established := spans[spanDecision], spans[spanAttempt], spans[spanEstablished]
	if len(decision) != 1 || len(attempt) != 1 || len(established) != 1 {
		t.Fatalf("children: %v", spans)
	}
	seen := map[string]bool{}
	for _, s := range []*tracepb.Span{root, decision[0], attempt[0], established[0]} {
		id := hex.EncodeToString(s.GetSpanId())
		if seen[id] || hex.EncodeToString(s.GetTraceId()) != f.TraceID().String() {
			t.Errorf("span id %s twice, or not of the trace", id)
		}
		if seen[id] = true; s != root && hex.EncodeToString(s.GetParentSpanId()) != ids.Span.String() {
			t.Errorf("%s is no child", s.GetName())
		}
	}
	d := decision[0]
	if at(d.GetStartTimeUnixNano()) != 0 || at(d.GetEndTimeUnixNano()) != 0 || d.GetKind() != tracepb.Span_SPAN_KIND_INTERNAL {
		t.Errorf("decision: %v", d)
	}
	want(t, "decision", text(d.GetAttributes()), []string{
		"kptrace.mode=iptables", "kptrace.algorithm=random", "kptrace.candidates=3", "kptrace.probability=0.3333",
		"kptrace.policy=Cluster", "kptrace.masquerade=no", "kptrace.affinity=hit", "kptrace.affinity.age=5",
		"kptrace.affinity.timeout=1.08e+04", "kptrace.excluded.not_ready=1",
	})
	if e := d.GetEvents(); len(e) != 1 || e[0].GetName() != eventAffinity || at(e[0].GetTimeUnixNano()) != 0 {
		t.Errorf("events of the decision: %v", e)
	}
	a := attempt[0]
	if at(a.GetStartTimeUnixNano()) != 0 || at(a.GetEndTimeUnixNano()) != 800*time.Microsecond || a.GetKind() != tracepb.Span_SPAN_KIND_CLIENT || len(a.GetEvents()) != 0 {
		t.Errorf("attempt: %v", a)
	}
	want(t, "attempt", text(a.GetAttributes()), []string{
		"kptrace.attempt=1", "kptrace.attempt.outcome=established", "destination.address=10.244.2.7", "destination.port=8080",
		"destination.k8s.namespace.name=shop", "destination.k8s.pod.name=foo-5c", "destination.k8s.node.name=node2",
		"destination.k8s.statefulset.name=foo",
	})
	if s := established[0]; at(s.GetStartTimeUnixNano()) != 800*time.Microsecond || at(s.GetEndTimeUnixNano()) != 32*ms {
		t.Errorf("established: %v", s)
	}
}

// TestSpansOfARetry wants one attempt after the other, and when the SYN was
// sent again.
func TestSpansOfARetry(t *testing.T) {
	spans := one(t, retried())
	a := spans[spanAttempt]
	if len(a) != 2 {
		t.Fatalf("%d attempts", len(a))
	}
	first, second := a[0], a[1]
	if at(first.GetEndTimeUnixNano()) != 7*time.Second || first.GetStatus().GetCode() != tracepb.Status_STATUS_CODE_ERROR ||
		len(first.GetEvents()) != 1 || at(first.GetEvents()[0].GetTimeUnixNano()) != 3*time.Second {
		t.Errorf("first: %v", first)
	}
	if at(second.GetStartTimeUnixNano()) != 7*time.Second || at(second.GetEndTimeUnixNano()) != 7*time.Second+ms ||
		second.GetStatus().GetCode() != tracepb.Status_STATUS_CODE_UNSET {
		t.Errorf("second: %v", second)
	}
	root := spans[spanConnection][0]
	got := text(root.GetAttributes())
	if !slices.Contains(got, "kptrace.attempts=2") || !slices.Contains(got, "kptrace.retransmits=2") ||
		root.GetStatus().GetCode() != tracepb.Status_STATUS_CODE_UNSET {
		t.Errorf("connection: %v %v", got, root.GetStatus())
	}
}

func TestSpansOfFailures(t *testing.T) {
	reset := good()
	reset.Outcome, reset.Reason = trace.Reset, trace.ResetByEndpoint
	left := good()
	left.Outcome, left.Reason = trace.Reset, trace.ResetByClient
	for _, c := range []struct {
		name    string
		flow    *trace.Flow
		failed  bool
		text    string
		end     time.Duration // -1 is when it was exported
		attempt time.Duration
	}{
		{"refused", refused(), true, "refused: endpoint-refused", ms, ms},
		{"rejected", rejected(), true, "rejected: no-endpoints", 0, -1},
		{"timeout", gaveUp(), true, "timeout: syn-unanswered", -1, -1},
		{"reset by endpoint", reset, true, "reset: reset-by-endpoint", 32 * ms, 800 * time.Microsecond},
		{"reset by client", left, false, "", 32 * ms, 800 * time.Microsecond},
		{"unknown", blind(), false, "", -1, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			spans := one(t, c.flow)
			root := spans[spanConnection][0]
			code := tracepb.Status_STATUS_CODE_UNSET
			if c.failed {
				code = tracepb.Status_STATUS_CODE_ERROR
			}
			if s := root.GetStatus(); s.GetCode() != code || s.GetMessage() != c.text {
				t.Errorf("status %v", s)
			}
			why := slices.ContainsFunc(text(root.GetAttributes()), func(a string) bool {
				return a == "error.type="+string(c.flow.Reason)
			})
			if why != c.failed {
				t.Errorf("attributes %v", text(root.GetAttributes()))
			}
			end := at(root.GetEndTimeUnixNano())
			if now := time.Since(start); c.end >= 0 && end != c.end || c.end < 0 && (end > now || end < now-time.Minute) {
				t.Errorf("ends after %v", end)
			}
			if c.attempt >= 0 {
				if got := at(spans[spanAttempt][0].GetEndTimeUnixNano()); got != c.attempt {
					t.Errorf("the attempt ends after %v", got)
				}
			}
		})
	}
}

// TestJoined wants the connection in the application's trace, and a link to
// each further request.
func TestJoined(t *testing.T) {
	f := carrying(1)
	root := one(t, f)[spanConnection][0]
	if hex.EncodeToString(root.GetTraceId()) != f.Carried[0].Trace.String() ||
		hex.EncodeToString(root.GetParentSpanId()) != f.Carried[0].Span.String() ||
		hex.EncodeToString(root.GetSpanId()) != f.SpanContext().Span.String() {
		t.Errorf("not joined: %v", root)
	}
	check := func(links []*tracepb.Span_Link, want []trace.Carried) {
		t.Helper()
		if len(links) != len(want) {
			t.Fatalf("%d links", len(links))
		}
		for i, l := range links {
			if hex.EncodeToString(l.GetTraceId()) != want[i].Trace.String() || hex.EncodeToString(l.GetSpanId()) != want[i].Span.String() ||
				text(l.GetAttributes())[0] != "kptrace.request.time="+want[i].Time.Format(time.RFC3339Nano) {
				t.Errorf("link %d: %v", i, l)
			}
		}
	}
	check(root.GetLinks(), f.Carried[1:])
	if !slices.Contains(text(root.GetAttributes()), "kptrace.requests.more=2") {
		t.Error("what is not linked is not counted")
	}

	// Nobody records the application's span: a trace of its own, and links.
	f = carrying(0)
	root = one(t, f)[spanConnection][0]
	if hex.EncodeToString(root.GetTraceId()) != f.TraceID().String() || f.TraceID() == f.Carried[0].Trace || len(root.GetParentSpanId()) != 0 {
		t.Errorf("joined: %v", root)
	}
	check(root.GetLinks(), f.Carried)
}

// TestLimits wants the limits that OpenTelemetry's environment variables set,
// and what they cost said.
func TestLimits(t *testing.T) {
	for name, value := range map[string]string{
		"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "5", "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT": "4",
		"OTEL_SPAN_EVENT_COUNT_LIMIT": "1", "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT": "0",
		"OTEL_SPAN_LINK_COUNT_LIMIT": "2", "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT": "0",
	} {
		t.Setenv(name, value)
	}
	f := carrying(0)
	all := attrs{}
	all.connection(f)
	root := one(t, f)[spanConnection][0]
	want(t, "attributes", text(root.GetAttributes()), []string{
		"kptrace.flow.id=0000", "kptrace.outcome=clos", "network.transport=tcp", "network.type=ipv4", "source.address=10.2",
	})
	if n := root.GetDroppedAttributesCount(); int(n) != len(all)-5 {
		t.Errorf("%d attributes dropped of %d", n, len(all))
	}
	if e := root.GetEvents(); len(e) != 1 || at(e[0].GetTimeUnixNano()) != 32*ms || root.GetDroppedEventsCount() != 1 ||
		len(e[0].GetAttributes()) != 0 || e[0].GetDroppedAttributesCount() != 1 {
		t.Errorf("events %v, %d dropped", e, root.GetDroppedEventsCount())
	}
	l := root.GetLinks()
	if len(l) != 2 || int(root.GetDroppedLinksCount()) != len(f.Carried)-2 || l[0].GetDroppedAttributesCount() != 1 ||
		hex.EncodeToString(l[1].GetSpanId()) != f.Carried[len(f.Carried)-1].Span.String() {
		t.Errorf("links %v, %d dropped of %d", l, root.GetDroppedLinksCount(), len(f.Carried))
	}
}

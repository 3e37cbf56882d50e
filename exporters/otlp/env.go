package otlp

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// FromEnv reads those OTEL_* variables that OpenTelemetry's exporters leave to
// the program. The endpoint, headers, timeouts, compression, certificates,
// limits of spans and attributes of the resource are read by them. get is
// os.Getenv. enabled says that the environment names a collector: without one
// nothing is sent.
func FromEnv(get func(string) string) (c Config, enabled bool, err error) {
	const prefix = "OTEL_EXPORTER_OTLP_"
	first := func(names ...string) string {
		for _, n := range names {
			if v := strings.TrimSpace(get(n)); v != "" {
				return v
			}
		}
		return ""
	}
	e := env{get: get}
	traces, logs := first(prefix+"TRACES_ENDPOINT", prefix+"ENDPOINT"), first(prefix+"LOGS_ENDPOINT", prefix+"ENDPOINT")
	c.Traces = Signal{
		Protocol: first(prefix+"TRACES_PROTOCOL", prefix+"PROTOCOL"),
		Off:      !e.wanted("OTEL_TRACES_EXPORTER", "otlp"),
		Queue:    e.number("OTEL_BSP_MAX_QUEUE_SIZE"), Batch: e.number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE"),
		Delay: e.millis("OTEL_BSP_SCHEDULE_DELAY"),
	}
	c.Logs = Signal{
		Protocol: first(prefix+"LOGS_PROTOCOL", prefix+"PROTOCOL"),
		Off:      !e.wanted("OTEL_LOGS_EXPORTER", "none"),
		Queue:    e.number("OTEL_BLRP_MAX_QUEUE_SIZE"), Batch: e.number("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE"),
		Delay: e.millis("OTEL_BLRP_SCHEDULE_DELAY"),
	}
	def(&c.Traces.Protocol, ProtocolOf(traces))
	def(&c.Logs.Protocol, ProtocolOf(logs))
	c.Sampling = e.sampling()
	disabled := strings.EqualFold(first("OTEL_SDK_DISABLED"), "true")
	return c, !disabled && traces+logs != "" && !(c.Traces.Off && c.Logs.Off), e.err
}

// ProtocolOf guesses the protocol from an endpoint's port: 4317 is that of
// gRPC. Everything else is taken for HTTP, which is what OpenTelemetry wants
// for a default.
func ProtocolOf(endpoint string) string {
	u, err := url.Parse(endpoint)
	if err == nil && u.Port() == "4317" {
		return GRPC
	}
	return HTTP
}

// env reads variables and keeps the first complaint.
type env struct {
	get func(string) string
	err error
}

func (e *env) bad(name, value, use string) {
	if e.err == nil {
		e.err = fmt.Errorf("otlp: %s=%q: use %s", name, value, use)
	}
}

// wanted reads the exporter of a signal.
func (e *env) wanted(name, standard string) bool {
	v := strings.TrimSpace(e.get(name))
	def(&v, standard)
	switch v {
	case "otlp":
		return true
	case "none":
		return false
	}
	e.bad(name, v, "otlp or none")
	return false
}

func (e *env) number(name string) int {
	v := strings.TrimSpace(e.get(name))
	if v == "" {
		return 0
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 || n > 1<<20 {
		e.bad(name, v, "a number from 1 to 1048576")
		return 0
	}
	return n
}

func (e *env) millis(name string) time.Duration {
	return time.Duration(e.number(name)) * time.Millisecond
}

// sampling reads OTEL_TRACES_SAMPLER. A connection has no parent that a sampler
// could ask but the application's span, which Sampling.Keep does ask: so the
// parent-based samplers are the same as the others.
func (e *env) sampling() Sampling {
	const name, arg = "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"
	s := Sampling{Ratio: 1}
	switch v := strings.TrimSpace(e.get(name)); strings.TrimPrefix(v, "parentbased_") {
	case "", "always_on":
	case "always_off":
		s = Sampling{Never: true}
	case "traceidratio":
		text := strings.TrimSpace(e.get(arg))
		if text == "" {
			break
		}
		r, err := strconv.ParseFloat(text, 64)
		if err != nil || !(r >= 0 && r <= 1) {
			e.bad(arg, text, "a number from 0 to 1")
			break
		}
		s.Ratio = r
	default:
		e.bad(name, v, "always_on, always_off or traceidratio, or one of them with parentbased_ before it")
	}
	return s
}

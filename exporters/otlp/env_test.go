package otlp

import (
	"testing"
	"time"
)

func TestFromEnv(t *testing.T) {
	read := func(vars map[string]string) (Config, bool, error) {
		return FromEnv(func(name string) string { return vars[name] })
	}
	if _, on, err := read(nil); on || err != nil {
		t.Errorf("on without a collector: %v", err)
	}
	c, on, err := read(map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"})
	if !on || err != nil || c.Traces.Off || !c.Logs.Off || c.Traces.Protocol != GRPC || c.Sampling != (Sampling{Ratio: 1}) || c.Endpoint != "" {
		t.Errorf("%+v %v %v", c, on, err)
	}
	c, on, err = read(map[string]string{
		"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://c/otlp", "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL": "grpc", "OTEL_LOGS_EXPORTER": "otlp",
		"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25",
		"OTEL_BSP_MAX_QUEUE_SIZE": "100", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "10", "OTEL_BSP_SCHEDULE_DELAY": "250",
		"OTEL_BLRP_MAX_QUEUE_SIZE": "200",
	})
	if !on || err != nil || c.Sampling.Ratio != 0.25 || c.Traces != (Signal{Protocol: HTTP, Queue: 100, Batch: 10, Delay: 250 * time.Millisecond}) ||
		c.Logs != (Signal{Protocol: GRPC, Queue: 200}) {
		t.Errorf("%+v %v %v", c, on, err)
	}
	for name, vars := range map[string]map[string]string{
		"disabled": {"OTEL_SDK_DISABLED": "TRUE"},
		"none":     {"OTEL_TRACES_EXPORTER": "none"},
	} {
		vars["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://c:4318"
		if _, on, err := read(vars); on || err != nil {
			t.Errorf("%s: on, %v", name, err)
		}
	}
	if c, _, _ := read(map[string]string{"OTEL_TRACES_SAMPLER": "always_off"}); !c.Sampling.Never {
		t.Error("always_off samples")
	}
	for name, value := range map[string]string{
		"OTEL_TRACES_SAMPLER": "jaeger_remote", "OTEL_TRACES_EXPORTER": "zipkin", "OTEL_BSP_MAX_QUEUE_SIZE": "-1", "OTEL_BSP_SCHEDULE_DELAY": "1s",
	} {
		if _, _, err := read(map[string]string{name: value}); err == nil {
			t.Errorf("%s=%s: no error", name, value)
		}
	}
	if _, _, err := read(map[string]string{"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "10%"}); err == nil {
		t.Error("10%: no error")
	}
}

// TestEndpointFromEnv wants the exporters to follow the variables that are left
// to them: endpoint, headers and compression.
func TestEndpointFromEnv(t *testing.T) {
	for _, protocol := range []string{GRPC, HTTP} {
		t.Run(protocol, func(t *testing.T) {
			r := newReceiver()
			var endpoint string
			if protocol == GRPC {
				endpoint, _ = r.serveGRPC(t, "127.0.0.1:0", nil)
			} else {
				endpoint = r.serveHTTP(t, nil)
			}
			t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
			t.Setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=fromenv")
			t.Setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
			t.Setenv("OTEL_SERVICE_NAME", "proxy-tracing")
			t.Setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test,k8s.node.name=other")
			s := export(t, Config{Traces: Signal{Protocol: protocol}, Sampling: Sampling{Ratio: 1}, Node: "node1"}, r, good()).Traces
			if s.Sent != 1 || len(r.got()) == 0 || r.headers["x-token"] != "fromenv" || r.gzipped == 0 {
				t.Errorf("%+v, headers %v, %d compressed", s, r.headers, r.gzipped)
			}
			res := map[string]bool{}
			for _, a := range text(r.resource.GetAttributes()) {
				res[a] = true
			}
			if !res["service.name=proxy-tracing"] || !res["deployment.environment.name=test"] || !res["k8s.node.name=other"] {
				t.Errorf("resource %v", res)
			}
		})
	}
}

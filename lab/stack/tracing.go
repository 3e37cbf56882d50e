package stack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/kptrace/kptrace/lab"
)

// Collector and Jaeger are the names of the servers that spans go to.
const (
	Collector = "collector"
	Jaeger    = "jaeger"
)

// TracingEnv names the folder of the two programs, as scripts/tracing.sh prints
// it.
const TracingEnv = "KPTRACE_TRACING"

// The ports on the first node: OTLP by gRPC and HTTP, what the collector says
// of itself, OTLP of Jaeger, its page, and what it says of itself.
const (
	otlpPort       = 4317
	otlpHTTPPort   = 4318
	collectorPort  = 8888
	jaegerOTLPPort = 4327
	jaegerPort     = 16686
	jaegerSelfPort = 14269
)

// HasTracing reports whether the two programs are at hand.
func HasTracing() bool { return os.Getenv(TracingEnv) != "" }

// TracingArgs are what nodes of a scenario need to send spans and log records
// to the collector on the first node; joined adds the search for requests.
func TracingArgs(scenario string, joined bool) ([]string, error) {
	dir, err := os.MkdirTemp("", "kptrace-scenario-")
	if err != nil {
		return nil, fmt.Errorf("stack: %w", err)
	}
	defer os.RemoveAll(dir)
	if err := lab.WriteScenario(scenario, filepath.Join(dir, "x")); err != nil {
		return nil, err
	}
	c, _, err := lab.Read(filepath.Join(dir, "x"))
	if err != nil || len(c.Nodes) == 0 {
		return nil, errors.Join(errors.New("stack: the scenario has no node"), err)
	}
	at := netip.AddrPortFrom(c.Nodes[0].Addr, otlpPort)
	args := []string{"--otlp-endpoint", "http://" + at.String(), "--otlp-logs", "--cluster-name", "lab"}
	if joined {
		args = append(args, "--traceparent")
	}
	return args, nil
}

// StartTracing runs Jaeger and the collector on the first node.
func (s *Stack) StartTracing(ctx context.Context) error {
	if err := s.startJaeger(ctx); err != nil {
		return err
	}
	return s.startCollector(ctx)
}

func (s *Stack) startJaeger(ctx context.Context) error {
	at := func(port int) string { return fmt.Sprintf("127.0.0.1:%d", port) }
	return s.Start(ctx, Server{
		Name: Jaeger, Node: s.first().Name, Program: filepath.Join(os.Getenv(TracingEnv), Jaeger),
		Env: []string{"COLLECTOR_OTLP_ENABLED=true", "SPAN_STORAGE_TYPE=memory"},
		Args: []string{
			"--collector.otlp.grpc.host-port=" + at(jaegerOTLPPort), "--collector.otlp.http.host-port=" + at(jaegerOTLPPort+1),
			"--query.http-server.host-port=" + at(jaegerPort), "--query.grpc-server.host-port=" + at(jaegerPort-1),
			"--admin.http.host-port=" + at(jaegerSelfPort), "--collector.grpc-server.host-port=" + at(14250),
			"--collector.http-server.host-port=" + at(14268), "--memory.max-traces=200000", "--log-level=warn",
		},
		Page: loopback(jaegerPort), Ready: "/api/services",
	})
}

func (s *Stack) startCollector(ctx context.Context) error {
	config := filepath.Join(s.cfg.Dir, "collector.yaml")
	first := s.first().Addr
	text := fmt.Sprintf(collectorConfig, netip.AddrPortFrom(first, otlpPort), netip.AddrPortFrom(first, otlpHTTPPort),
		loopback(jaegerOTLPPort), collectorPort)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return fmt.Errorf("stack: %w", err)
	}
	return s.Start(ctx, Server{
		Name: Collector, Node: s.first().Name, Program: filepath.Join(os.Getenv(TracingEnv), Collector),
		Args: []string{"--config", config}, Page: loopback(collectorPort), Ready: "/metrics",
	})
}

const collectorConfig = `receivers:
  otlp:
    protocols:
      grpc: {endpoint: %q}
      http: {endpoint: %q}
exporters:
  otlp: {endpoint: %q, tls: {insecure: true}}
  debug: {}
service:
  telemetry:
    logs: {level: warn}
    metrics: {readers: [{pull: {exporter: {prometheus: {host: 127.0.0.1, port: %d}}}}]}
  pipelines:
    traces: {receivers: [otlp], exporters: [otlp]}
    logs: {receivers: [otlp], exporters: [debug]}
`

func loopback(port int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(port))
}

// first is the node on which the servers run.
func (s *Stack) first() *lab.Node { return &s.cfg.Lab.Cluster().Nodes[0] }

// stop ends one server.
func (s *Stack) stop(name string) error {
	r, err := s.find(name)
	if err != nil {
		return err
	}
	s.mu.Lock()
	for i := range s.running {
		if s.running[i] == r {
			s.running = append(s.running[:i:i], s.running[i+1:]...)
			break
		}
	}
	s.mu.Unlock()
	_ = r.process.Kill()
	<-r.process.Done()
	return nil
}

// jaegerSpan is a span as Jaeger's API tells of it.
type jaegerSpan struct {
	Trace      string `json:"traceID"`
	ID         string `json:"spanID"`
	Name       string `json:"operationName"`
	References []struct {
		Type  string `json:"refType"`
		Trace string `json:"traceID"`
		Span  string `json:"spanID"`
	} `json:"references"`
	// Start and Duration are microseconds.
	Start    int64       `json:"startTime"`
	Duration int64       `json:"duration"`
	Tags     []jaegerTag `json:"tags"`
	Logs     []struct {
		Time   int64       `json:"timestamp"`
		Fields []jaegerTag `json:"fields"`
	} `json:"logs"`
}

type jaegerTag struct {
	Key   string `json:"key"`
	Value any    `json:"value"`
}

// tag returns a tag as text, empty if there is none.
func (s *jaegerSpan) tag(key string) string {
	for _, t := range s.Tags {
		if t.Key == key {
			return fmt.Sprint(t.Value)
		}
	}
	return ""
}

// parent is the span this one is a child of, within the trace.
func (s *jaegerSpan) parent() string {
	for _, r := range s.References {
		if r.Type == "CHILD_OF" {
			return r.Span
		}
	}
	return ""
}

// traces asks Jaeger; each element of the answer is one trace.
func (s *Stack) traces(ctx context.Context, path string, query url.Values) ([][]jaegerSpan, error) {
	body, err := s.page(ctx, Jaeger, path+"?"+query.Encode())
	if err != nil {
		return nil, err
	}
	var answer struct {
		Data []struct {
			Spans []jaegerSpan `json:"spans"`
		} `json:"data"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, fmt.Errorf("stack: Jaeger: %w", err)
	}
	var list [][]jaegerSpan
	for _, d := range answer.Data {
		list = append(list, d.Spans)
	}
	return list, nil
}

// page gets what a server answers at a path.
func (s *Stack) page(ctx context.Context, server, path string) ([]byte, error) {
	client, err := s.Client(server)
	if err != nil {
		return nil, err
	}
	return get(ctx, client, "http://"+server+path)
}

func get(ctx context.Context, client *http.Client, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("stack: %w", err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK && res.StatusCode != http.StatusNotFound {
		err = fmt.Errorf("stack: %s: %s: %.200s", url, res.Status, body)
	}
	return body, err
}

// sumOf adds up the series of a metric on a page in the text format whose labels
// contain a text.
func sumOf(page []byte, metric, label string) (sum float64) {
	for line := range strings.Lines(string(page)) {
		name, rest, labelled := strings.Cut(strings.TrimSpace(line), "{")
		if !labelled {
			name, rest, _ = strings.Cut(strings.TrimSpace(line), " ")
			rest = "} " + rest
		}
		labels, value, ok := strings.Cut(rest, "} ")
		if !ok || name != metric || !strings.Contains(labels, label) {
			continue
		}
		if v, err := strconv.ParseFloat(value, 64); err == nil {
			sum += v
		}
	}
	return sum
}

package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/exporters/otlp"
	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/proxy"
)

// otlpFlags say what is exported to OpenTelemetry. Flags have the last word;
// what they do not say the OTEL_* variables do.
type otlpFlags struct {
	cmd         *cobra.Command
	endpoint    string
	protocol    string
	headers     []string
	compression string
	timeout     time.Duration
	ca          string
	cert, key   string
	sample      float64
	slow        time.Duration
	queue       int
	logs        bool
	cluster     string
	join        bool
	joinGroup   uint16
}

func (f *otlpFlags) add(cmd *cobra.Command) {
	f.cmd = cmd
	fl := cmd.Flags()
	fl.StringVar(&f.endpoint, "otlp-endpoint", "", "export connections as OpenTelemetry spans to this collector, as http://HOST:4317; https is TLS (also OTEL_EXPORTER_OTLP_ENDPOINT and the other OTEL_* variables)")
	fl.StringVar(&f.protocol, "otlp-protocol", "", "grpc or http/protobuf (default: grpc at port 4317, else http/protobuf)")
	fl.StringSliceVar(&f.headers, "otlp-header", nil, "send NAME=VALUE with each request; secrets are better off in OTEL_EXPORTER_OTLP_HEADERS")
	fl.StringVar(&f.compression, "otlp-compression", "", "gzip compresses what is sent")
	fl.DurationVar(&f.timeout, "otlp-timeout", 0, "most time for one request (default 10s)")
	fl.StringVar(&f.ca, "otlp-ca", "", "file of certificates to trust for the collector, instead of the system's")
	fl.StringVar(&f.cert, "otlp-cert", "", "file with the client certificate to show the collector")
	fl.StringVar(&f.key, "otlp-key", "", "file with the key of --otlp-cert")
	fl.Float64Var(&f.sample, "otlp-sample", 1, "share of connections to export, from 0 to 1; failed, retried and slow ones are exported in any case")
	fl.DurationVar(&f.slow, "otlp-slow", time.Second, "time to establish from which on a connection is slow; 0 means none is")
	fl.IntVar(&f.queue, "otlp-queue", 8192, "connections that may wait to be sent; more are dropped and counted")
	fl.BoolVar(&f.logs, "otlp-logs", false, "export a log record for every connection too")
	fl.BoolVar(&f.join, "traceparent", false, "make connections part of the application's trace: look for the W3C traceparent header in clear-text HTTP/1 requests (iptables mode); only its ids are kept")
	fl.Uint16Var(&f.joinGroup, "traceparent-group", 101, "NFLOG group for --traceparent")
	fl.StringVar(&f.cluster, "cluster-name", "", "the cluster's name, as exported in k8s.cluster.name")
	_ = cmd.RegisterFlagCompletionFunc("otlp-protocol", cobra.FixedCompletions([]string{otlp.GRPC, otlp.HTTP}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("otlp-compression", cobra.FixedCompletions([]string{"gzip"}, cobra.ShellCompDirectiveNoFileComp))
}

// config is nil where nothing is exported: neither a flag nor the environment
// names a collector.
func (f *otlpFlags) config(getenv func(string) string) (*otlp.Config, error) {
	c, enabled, err := otlp.FromEnv(getenv)
	if err != nil {
		return nil, err
	}
	given := f.cmd.Flags().Changed
	if f.endpoint == "" && !enabled {
		for _, name := range []string{"otlp-protocol", "otlp-header", "otlp-compression", "otlp-ca", "otlp-cert", "otlp-sample", "otlp-logs", "traceparent"} {
			if given(name) {
				return nil, fmt.Errorf("--%s needs a collector: give --otlp-endpoint http://HOST:4317, or OTEL_EXPORTER_OTLP_ENDPOINT", name)
			}
		}
		return nil, nil
	}
	if f.endpoint != "" {
		if err := otlp.CheckEndpoint(f.endpoint); err != nil {
			return nil, fmt.Errorf("--otlp-endpoint: %w", err)
		}
		c.Endpoint = f.endpoint
		c.Traces.Protocol = otlp.ProtocolOf(f.endpoint)
		c.Logs.Protocol = c.Traces.Protocol
	}
	if f.protocol != "" {
		if f.protocol != otlp.GRPC && f.protocol != otlp.HTTP {
			return nil, fmt.Errorf("--otlp-protocol=%q: use %s or %s", f.protocol, otlp.GRPC, otlp.HTTP)
		}
		c.Traces.Protocol, c.Logs.Protocol = f.protocol, f.protocol
	}
	if c.Headers, err = headers(f.headers); err != nil {
		return nil, err
	}
	if f.compression != "" && f.compression != "gzip" {
		return nil, fmt.Errorf("--otlp-compression=%q: use gzip", f.compression)
	}
	if (f.cert == "") != (f.key == "") {
		return nil, errors.New("--otlp-cert and --otlp-key go together")
	}
	if given("otlp-sample") {
		if f.sample < 0 || f.sample > 1 {
			return nil, fmt.Errorf("--otlp-sample=%v: use a number from 0 to 1", f.sample)
		}
		c.Sampling = otlp.Sampling{Ratio: f.sample}
	}
	if f.slow < 0 {
		return nil, fmt.Errorf("--otlp-slow=%v: give a time above 0, or 0 for none", f.slow)
	}
	if given("otlp-queue") {
		if f.queue < 1 {
			return nil, fmt.Errorf("--otlp-queue=%d: give a number above 0", f.queue)
		}
		c.Traces.Queue, c.Logs.Queue = f.queue, f.queue
	}
	if f.logs {
		c.Logs.Off = false
	}
	c.Sampling.Slow = f.slow
	c.Compression, c.Timeout, c.CA, c.Cert, c.Key = f.compression, f.timeout, f.ca, f.cert, f.key
	c.Cluster = f.cluster
	c.Pod, c.Namespace = thisPod(getenv)
	return &c, nil
}

// headers reads NAME=VALUE pairs.
func headers(list []string) (map[string]string, error) {
	if len(list) == 0 {
		return nil, nil
	}
	m := map[string]string{}
	for _, h := range list {
		name, value, ok := strings.Cut(h, "=")
		if name = strings.ToLower(strings.TrimSpace(name)); !ok || name == "" {
			return nil, fmt.Errorf("--otlp-header: %q is not NAME=VALUE", name)
		}
		m[name] = strings.TrimSpace(value)
	}
	return m, nil
}

// thisPod finds the pod that this runs in: from the variables that manifests
// set by the downward API, or the namespace from the service account.
func thisPod(getenv func(string) string) (pod, namespace string) {
	pod, namespace = getenv("POD_NAME"), getenv("POD_NAMESPACE")
	if namespace == "" {
		b, err := os.ReadFile("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
		if err == nil {
			namespace = strings.TrimSpace(string(b))
		}
	}
	return pod, namespace
}

// exportText is what became of one signal, for status.
func exportText(e *relay.Export, now time.Time) string {
	to := e.Endpoint
	if to == "" {
		to = "the collector of the environment"
	}
	s := fmt.Sprintf("%s to %s by %s: %d sent of %d connections", e.Signal, to, e.Protocol, e.Sent, e.Seen)
	for _, p := range []struct {
		n    uint64
		what string
	}{{e.Unsampled, "not sampled"}, {e.Dropped, "dropped"}, {e.Failed, "failed"}, {e.Queued, "waiting"}} {
		if p.n > 0 {
			s += fmt.Sprintf(", %d %s", p.n, p.what)
		}
	}
	if e.Rejected > 0 {
		s += fmt.Sprintf("; the collector did not keep %d items", e.Rejected)
	}
	if e.Overrun > 0 {
		s += fmt.Sprintf("; %d updates came too fast", e.Overrun)
	}
	if !e.Failing.IsZero() {
		s += fmt.Sprintf("; failing for %s: %s", text.Duration(max(0, now.Sub(e.Failing))), e.LastError)
	}
	return s
}

// exportJSON is a relay.Export in status -o json.
type exportJSON struct {
	Signal      string     `json:"signal"`
	Endpoint    string     `json:"endpoint"`
	Protocol    string     `json:"protocol"`
	Seen        uint64     `json:"seen"`
	Unsampled   uint64     `json:"unsampled"`
	Dropped     uint64     `json:"dropped"`
	Queued      uint64     `json:"queued"`
	Capacity    uint64     `json:"capacity"`
	Sent        uint64     `json:"sent"`
	Failed      uint64     `json:"failed"`
	Rejected    uint64     `json:"rejected"`
	Overrun     uint64     `json:"overrun"`
	LastError   string     `json:"lastError"`
	LastErrorAt *time.Time `json:"lastErrorAt"`
	Failing     *time.Time `json:"failingSince"`
}

func exportsJSON(list []relay.Export) []exportJSON {
	at := func(t time.Time) *time.Time {
		if t.IsZero() {
			return nil
		}
		t = t.UTC()
		return &t
	}
	out := []exportJSON{}
	for i := range list {
		e := &list[i]
		out = append(out, exportJSON{
			Signal: e.Signal, Endpoint: e.Endpoint, Protocol: e.Protocol, Seen: e.Seen, Unsampled: e.Unsampled,
			Dropped: e.Dropped, Queued: e.Queued, Capacity: e.Capacity, Sent: e.Sent, Failed: e.Failed,
			Rejected: e.Rejected, Overrun: e.Overrun, LastError: e.LastError, LastErrorAt: at(e.LastErrorAt), Failing: at(e.Failing),
		})
	}
	return out
}

// requestGroup is the group for requests, 0 if they are not looked for.
func (f *otlpFlags) requestGroup(of *proxyFlags, mode proxy.Mode) (uint16, error) {
	switch {
	case !f.join:
		return 0, nil
	case !of.trace:
		return 0, errors.New("--traceparent needs tracing: leave out --trace=false")
	case mode != proxy.IPTables:
		return 0, fmt.Errorf("--traceparent works in iptables mode, not in %s mode", mode)
	case f.joinGroup == 0 || f.joinGroup == of.group:
		return 0, fmt.Errorf("--traceparent-group=%d: choose a group of its own, not 0 or that of --nflog-group", f.joinGroup)
	}
	return f.joinGroup, nil
}

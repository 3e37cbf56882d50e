package otlp

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"time"
)

// The protocols of OTLP, as OTEL_EXPORTER_OTLP_PROTOCOL names them.
const (
	GRPC = "grpc"
	HTTP = "http/protobuf"
)

// Config says what is exported, and where to. Whatever is left empty follows
// the OTEL_* variables of the environment, then the defaults of OpenTelemetry.
type Config struct {
	Traces, Logs Signal
	Sampling     Sampling

	// Endpoint is a URL as http://collector:4317; https means TLS. Over HTTP
	// /v1/traces and /v1/logs are added to its path.
	Endpoint string
	// Headers are sent with every request.
	Headers map[string]string
	// Compression is "gzip" if set.
	Compression string
	// Timeout bounds one request.
	Timeout time.Duration
	// CA is a file of certificates to trust instead of the system's, Cert and
	// Key are files with what the collector is shown.
	CA, Cert, Key string

	// Version is kptrace's own, Node the node's name in Kubernetes, Cluster
	// the cluster's, Pod and Namespace those of the pod this runs in; empty
	// where unknown.
	Version, Node, Cluster, Pod, Namespace string

	// GiveUp is how long a batch is tried again; 5 minutes. Flush bounds what
	// is sent at the end; 5 seconds.
	GiveUp, Flush time.Duration
	Logger        *slog.Logger
}

// Signal says how one kind of data is sent.
type Signal struct {
	// Off leaves it out.
	Off bool
	// Protocol is GRPC or HTTP; empty is HTTP.
	Protocol string
	// Queue is how many connections may wait; 8,192. A connection that finds
	// no room is dropped and counted. One that waits takes about 1.3 KB,
	// much of it shared with the node's history.
	Queue int
	// Batch is how many connections at most go into one request; 256. Delay is
	// how long the first of them waits for more; 1 second.
	Batch int
	Delay time.Duration
}

func (s *Signal) setDefaults() {
	def(&s.Protocol, HTTP)
	def(&s.Queue, 8192)
	def(&s.Batch, 256)
	def(&s.Delay, time.Second)
	s.Batch = min(s.Batch, s.Queue)
}

func (c *Config) setDefaults() {
	c.Traces.setDefaults()
	c.Logs.setDefaults()
	def(&c.GiveUp, 5*time.Minute)
	def(&c.Flush, 5*time.Second)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

func def[T comparable](p *T, value T) {
	var zero T
	if *p == zero {
		*p = value
	}
}

// check says what is wrong with a Config.
func (c *Config) check() error {
	for _, s := range []Signal{c.Traces, c.Logs} {
		if s.Protocol != GRPC && s.Protocol != HTTP {
			return fmt.Errorf("protocol %q: use %s or %s", s.Protocol, GRPC, HTTP)
		}
		if s.Queue < 0 || s.Batch < 0 || s.Delay < 0 {
			return errors.New("a queue, batch or delay below 0")
		}
	}
	if c.Sampling.Ratio < 0 || c.Sampling.Ratio > 1 {
		return fmt.Errorf("ratio %v: use a number from 0 to 1", c.Sampling.Ratio)
	}
	if c.Compression != "" && c.Compression != "gzip" {
		return fmt.Errorf("compression %q: use gzip", c.Compression)
	}
	if (c.Cert == "") != (c.Key == "") {
		return errors.New("a client certificate needs both its file and that of its key")
	}
	if c.Endpoint != "" {
		return CheckEndpoint(c.Endpoint)
	}
	return nil
}

// CheckEndpoint says what is wrong with the URL of a collector.
func CheckEndpoint(endpoint string) error {
	u, err := url.Parse(endpoint)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return fmt.Errorf("endpoint %q: write http://HOST:PORT, or https://HOST:PORT for TLS", endpoint)
	}
	return nil
}

// tls makes the configuration of TLS; nil where the Config says nothing of it.
func (c *Config) tls() (*tls.Config, error) {
	if c.CA == "" && c.Cert == "" {
		return nil, nil
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CA != "" {
		pem, err := os.ReadFile(c.CA)
		if err != nil {
			return nil, fmt.Errorf("reading the certificates to trust: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s: no certificate in PEM form in it", c.CA)
		}
	}
	if c.Cert != "" {
		pair, err := tls.LoadX509KeyPair(c.Cert, c.Key)
		if err != nil {
			return nil, fmt.Errorf("reading the client certificate: %w", err)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return cfg, nil
}

// path is the Endpoint for a signal over HTTP, whose path it is up to us to
// complete.
func (c *Config) path(suffix string) string {
	return strings.TrimSuffix(c.Endpoint, "/") + suffix
}

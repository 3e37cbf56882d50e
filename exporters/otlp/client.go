package otlp

import (
	"context"
	"crypto/tls"

	"go.opentelemetry.io/otel/exporters/otlp/otlplog/otlploggrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlplog/otlploghttp"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	sdklog "go.opentelemetry.io/otel/sdk/log"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
)

// Each of these makes options only of what the Config says, so that the
// environment decides the rest. Trying again is up to pipe, which does it the
// same way for both protocols and sees every try.

// reconnect keeps a gRPC connection from waiting two minutes for a collector
// that is back, as it would after some failures.
func reconnect() grpc.DialOption {
	b := backoff.DefaultConfig
	b.MaxDelay = retryMost
	return grpc.WithConnectParams(grpc.ConnectParams{Backoff: b, MinConnectTimeout: retryMost})
}

func traceClient(c *Config, t *tls.Config) otlptrace.Client {
	if c.Traces.Protocol == GRPC {
		opts := []otlptracegrpc.Option{
			otlptracegrpc.WithRetry(otlptracegrpc.RetryConfig{}), otlptracegrpc.WithDialOption(reconnect()),
		}
		if c.Endpoint != "" {
			opts = append(opts, otlptracegrpc.WithEndpointURL(c.Endpoint))
		}
		if len(c.Headers) > 0 {
			opts = append(opts, otlptracegrpc.WithHeaders(c.Headers))
		}
		if c.Compression != "" {
			opts = append(opts, otlptracegrpc.WithCompressor(c.Compression))
		}
		if c.Timeout > 0 {
			opts = append(opts, otlptracegrpc.WithTimeout(c.Timeout))
		}
		if t != nil {
			opts = append(opts, otlptracegrpc.WithTLSCredentials(credentials.NewTLS(t)))
		}
		return otlptracegrpc.NewClient(opts...)
	}
	opts := []otlptracehttp.Option{otlptracehttp.WithRetry(otlptracehttp.RetryConfig{})}
	if c.Endpoint != "" {
		opts = append(opts, otlptracehttp.WithEndpointURL(c.path("/v1/traces")))
	}
	if len(c.Headers) > 0 {
		opts = append(opts, otlptracehttp.WithHeaders(c.Headers))
	}
	if c.Compression != "" {
		opts = append(opts, otlptracehttp.WithCompression(otlptracehttp.GzipCompression))
	}
	if c.Timeout > 0 {
		opts = append(opts, otlptracehttp.WithTimeout(c.Timeout))
	}
	if t != nil {
		opts = append(opts, otlptracehttp.WithTLSClientConfig(t))
	}
	return otlptracehttp.NewClient(opts...)
}

func logExporter(ctx context.Context, c *Config, t *tls.Config) (sdklog.Exporter, error) {
	if c.Logs.Protocol == GRPC {
		opts := []otlploggrpc.Option{
			otlploggrpc.WithRetry(otlploggrpc.RetryConfig{}), otlploggrpc.WithDialOption(reconnect()),
		}
		if c.Endpoint != "" {
			opts = append(opts, otlploggrpc.WithEndpointURL(c.Endpoint))
		}
		if len(c.Headers) > 0 {
			opts = append(opts, otlploggrpc.WithHeaders(c.Headers))
		}
		if c.Compression != "" {
			opts = append(opts, otlploggrpc.WithCompressor(c.Compression))
		}
		if c.Timeout > 0 {
			opts = append(opts, otlploggrpc.WithTimeout(c.Timeout))
		}
		if t != nil {
			opts = append(opts, otlploggrpc.WithTLSCredentials(credentials.NewTLS(t)))
		}
		return otlploggrpc.New(ctx, opts...)
	}
	opts := []otlploghttp.Option{otlploghttp.WithRetry(otlploghttp.RetryConfig{})}
	if c.Endpoint != "" {
		opts = append(opts, otlploghttp.WithEndpointURL(c.path("/v1/logs")))
	}
	if len(c.Headers) > 0 {
		opts = append(opts, otlploghttp.WithHeaders(c.Headers))
	}
	if c.Compression != "" {
		opts = append(opts, otlploghttp.WithCompression(otlploghttp.GzipCompression))
	}
	if c.Timeout > 0 {
		opts = append(opts, otlploghttp.WithTimeout(c.Timeout))
	}
	if t != nil {
		opts = append(opts, otlploghttp.WithTLSClientConfig(t))
	}
	return otlploghttp.New(ctx, opts...)
}

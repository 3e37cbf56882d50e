package otlp

import (
	"context"
	"errors"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/resource"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
)

// newResource says who exports: kptrace, on its node, in its cluster and pod.
// OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES have the last word.
func newResource(ctx context.Context, c *Config) (*resource.Resource, error) {
	a := attrs{semconv.ServiceName("kptrace")}
	a.text(semconv.ServiceVersionKey, c.Version)
	a.text(semconv.K8SNodeNameKey, c.Node)
	a.text(semconv.K8SClusterNameKey, c.Cluster)
	a.text(semconv.K8SPodNameKey, c.Pod)
	a.text(semconv.K8SNamespaceNameKey, c.Namespace)
	a.text(semconv.ServiceInstanceIDKey, instance(c))
	res, err := resource.New(ctx,
		resource.WithTelemetrySDK(), resource.WithHost(), resource.WithOSType(), resource.WithProcessPID(),
		resource.WithAttributes(a...), resource.WithFromEnv())
	if errors.Is(err, resource.ErrPartialResource) || errors.Is(err, resource.ErrSchemaURLConflict) {
		return res, nil // what could be found is enough
	}
	return res, err
}

// instance tells the exporters of a cluster apart: there is one on each node.
func instance(c *Config) string {
	if c.Pod != "" {
		return c.Namespace + "." + c.Pod
	}
	return c.Node
}

// Resource lists what an Exporter with this Config says of itself, for docs and
// tests.
func Resource(ctx context.Context, c Config) ([]attribute.KeyValue, error) {
	res, err := newResource(ctx, &c)
	if err != nil {
		return nil, err
	}
	return res.Attributes(), nil
}

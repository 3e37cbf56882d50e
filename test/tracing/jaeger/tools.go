//go:build tools

// Package jaeger pins Jaeger, the store of traces that the tests query. Its
// all-in-one server is a main package of Jaeger's own module, so nothing else
// is needed.
package jaeger

import _ "github.com/jaegertracing/jaeger/cmd/all-in-one"

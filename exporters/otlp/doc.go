// Package otlp exports flows to OpenTelemetry: a trace of spans for each
// connection, and if wanted a log record, by OTLP over gRPC or HTTP.
//
// An Exporter reads a trace.Reader and acts on the revision that completed a
// Flow. It never delays the writer: what finds no room in its queue is dropped
// and counted, and a collector that is away costs no more memory than the
// queue. docs/otlp.md lists what is exported, and the variables and flags.
package otlp

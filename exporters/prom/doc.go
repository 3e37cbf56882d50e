// Package prom serves what kptrace knows as Prometheus metrics: the families
// of kube-proxy 1.36 by their exact names, types and labels, and our own under
// kptrace_. It is the only home of the Prometheus client.
//
// The proxy's packages know nothing of metrics. They give their state as
// values; Config says where from, and an Exporter turns them into metrics when
// it is scraped, or when it is told of a sync.
package prom

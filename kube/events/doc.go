// Package events writes Kubernetes Events (events.k8s.io/v1): what people find
// by kubectl describe at a Service, a Pod or a Node.
//
// Whoever has something to say hands a proxy.ObjectEvent to Recorder.Record,
// which never waits. One goroutine writes them. What repeats becomes a series of
// one Event; rates are limited for each object and for all; what could not be
// written is counted. An API server that is away is waited for, with a bounded
// queue; one that refuses is said once and asked again rarely. Nothing that
// matters waits for an Event.
package events

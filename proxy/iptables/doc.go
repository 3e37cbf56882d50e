// Package iptables is the proxy mode that programs iptables. Chain names,
// comments, marks and the order of rules are those of kube-proxy 1.36, so that
// everything that knows kube-proxy's rules knows ours; between them stand our
// own NFLOG rules, whose prefixes are proxy.Tags.
//
// Render is pure. Apply compares chain by chain and writes only what differs,
// in commits ordered so that no connection meets a half-made Service:
//
//	endpoint and service chains, filter additions, nat dispatch,
//	filter removals, deletions
//
// Tables are not atomic together, so a Service that loses its last endpoint is
// refused before it is no longer dispatched, and one that gains its first is
// dispatched before it is no longer refused.
//
// Walk evaluates the rendered rules, not the Snapshot they were made of.
package iptables

// Package health answers those who ask whether Services work on this node:
// load balancers and the kubelet at /healthz and /livez, and load balancers of
// Services with externalTrafficPolicy Local at each Service's
// healthCheckNodePort. Paths, bodies, headers and codes are those of
// kube-proxy 1.36 (KEP-3836).
//
// The handlers are pure: they ask functions for the state of the moment and
// keep none. What they say of the proxy comes from its Syncer, so a sync that
// keeps failing is told, whatever else runs.
package health

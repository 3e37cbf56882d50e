// Package serverhealth finds endpoints that do not answer and takes them out for
// a time, whatever the mode: the promise of a load balancer that Kubernetes'
// readiness, which takes tens of seconds and asks from the endpoint's own node,
// does not keep.
//
// Machine decides and is pure: signs in, an Overlay out. Checker is the edge
// around it: it connects to endpoints (active), looks at connections that are
// stuck or refused in the kernel's table (passive), and when an endpoint is out
// removes its half-open connections from that table, so that the clients' next
// SYN, about a second later, goes to another endpoint.
package serverhealth

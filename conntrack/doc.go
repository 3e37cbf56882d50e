// Package conntrack holds the vocabulary of connection tracking: Tuple, the
// key by which everything in kptrace finds everything else; Flow, one entry of
// the kernel's table; and Conn, which asks the kernel for entries one by one
// or all at once.
//
// The always-on event stream is not read here but by trace/source/ctevent,
// with a receive loop of its own; see docs/architecture.md.
package conntrack

// Package syscount counts system calls: all that processes of the caller's pid
// namespace make, by a BPF program at the tracepoint sys_enter. Linux lets root
// do that outside of user namespaces.
package syscount

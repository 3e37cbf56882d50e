// Package stack runs the servers that people look at metrics and traces with
// beside the nodes of a lab, and checks that what they show is true: what
// Prometheus has is held against what the lab's own clients counted.
//
// The servers run in a node's network namespace. Nothing outside of the lab is
// touched; Forward makes their pages reachable by a Unix socket.
package stack

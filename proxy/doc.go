// Package proxy is the vocabulary of intent: what Services should do. A
// Snapshot says which Services and endpoints there are, an Overlay what is out
// for a time, a Backend turns both into kernel state, a Program says what that
// state means (its Index of tagged rules) and does (Walk), and a Syncer keeps
// the kernel at the newest Snapshot.
//
// The package imports nothing heavy and never imports trace: the observer
// depends on the observed, and the proxy is usable alone.
package proxy

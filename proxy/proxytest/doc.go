// Package proxytest is the conformance table of all modes: what becomes of a
// first packet, by Service, endpoints and node on one side, source and
// destination on the other.
//
// The same rows run at two levels. Run holds a Program's Walk against them; a
// kernel test builds the World in namespaces, sends a real packet per row and
// holds what it sees against the same Want.
package proxytest

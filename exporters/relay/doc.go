// Package relay is the local API of a node: gRPC on a Unix socket that only
// its owner can use. A Server answers from a Ring, a History and a proxy's
// View; a Client turns what it sends back into trace.Messages.
//
// The generated types (Flow, Header and so on) are the same things on the
// wire; nothing outside this package needs them.
package relay

// Package iptables is the proxy mode that programs iptables. Chain names,
// comments, marks and the order of rules are those of kube-proxy 1.36, so that
// everything that knows kube-proxy's rules knows ours; between them stand our
// own NFLOG rules, whose prefixes are proxy.Tags.
//
// Render is pure. Apply compares chain by chain and writes only what differs,
// in commits ordered so that no connection meets a half-made Service:
//
//  1. the fixed chains and jumps;
//  2. filter: refusals of Services that have no endpoints any more;
//  3. nat: each Service's endpoint chains, the chains that lead to them, its
//     dispatch rules and the removal of chains out of use, in one commit;
//  4. nat: what no Service wants any more;
//  5. filter: refusals lifted, except of Services that failed in step 3.
//
// Tables are not atomic together, so a Service that loses its last endpoint is
// refused before it is no longer dispatched, and one that gains its first is
// dispatched before it is no longer refused. An unchanged endpoint chain is
// never touched, and with it the list in which xt_recent keeps its clients.
//
// Walk evaluates the rendered rules, not the Snapshot they were made of.
package iptables

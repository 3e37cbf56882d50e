// Package userspace is the userspace mode: this process accepts each
// connection to a Service and dials an endpoint itself, so that it can try
// another one where the first does not answer. kube-proxy had it until 1.25;
// the chains are named as there.
//
// Rules of nat lead packets for a Service to a port of this process, one for
// each Service port. The process asks the kernel for the address that the client
// dialled, decides by policy, picks round robin or by session affinity, dials
// with limits of 250 ms, 500 ms, 1 s and 2 s, each time another endpoint, and
// relays by splice(2). Addresses that lead nowhere are refused by rules of
// filter, as in iptables mode.
package userspace

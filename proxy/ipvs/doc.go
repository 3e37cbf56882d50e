// Package ipvs is the proxy mode that programs IPVS, the kernel's load balancer:
// one virtual server for each address and port of a Service, one real server for
// each endpoint, and a constant number of iptables rules that look into ipsets,
// by the names of kube-proxy 1.36. docs/modes.md says how each scheduler picks.
//
// Render is pure. Apply compares what it knows the kernel holds with what should
// be there and writes the difference in batches, in an order in which no
// connection meets a half-made Service:
//
//  1. members of ipsets, which let packets pass and say what is masqueraded;
//  2. the rules, which do not change when Services do;
//  3. virtual servers, then their real servers, then the addresses by which
//     packets come to them on the device kube-ipvs0;
//  4. real servers out of use, which keep their connections for a while
//     (graceful termination), virtual servers and addresses out of use;
//  5. members of ipsets out of use.
//
// Whose a virtual server is the kernel itself remembers, through kill -9 and a
// reboot of us: its address and port are a member of a set of ours. What is of
// others is never touched.
//
// A Service address without usable endpoints has no virtual server: its packets
// come to a rule that refuses or drops them, as in the iptables mode.
package ipvs

// Package drop tells why the kernel gave up a packet, and where in its code, by a BPF
// program on the tracepoint kfree_skb; and which segments this node's own TCP sends
// again, by one on tcp_retransmit_skb. They are assembled here and need no compiler;
// offsets come from the kernel's own BTF, and so do the names of the reasons.
//
// The tracepoints are the whole machine's, so the programs look at the network
// namespace of a packet's device or socket first.
//
// What pods and others send again needs no program: the rules see it as another
// packet.
//
// It needs CAP_BPF and CAP_PERFMON in the first user namespace and Linux 5.17 with
// BTF. Where the kernel refuses, paths are good without.
package drop

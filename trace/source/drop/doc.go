// Package drop tells why the kernel gave up a packet, by a BPF program on the
// tracepoint kfree_skb. It is assembled here and needs no compiler; offsets come
// from the kernel's own BTF, and so do the names of the reasons.
//
// The tracepoint is the whole machine's, so the program looks at the network
// namespace of a packet's device or socket first.
//
// What a client sends again needs no program: the rules see it as another packet.
//
// It needs CAP_BPF and CAP_PERFMON in the first user namespace and Linux 5.17 with
// BTF. Where the kernel refuses, paths are good without.
package drop

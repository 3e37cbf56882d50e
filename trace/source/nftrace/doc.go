// Package nftrace reads what nf_tables tells of traced packets: those that a
// TRACE rule of iptables-nft, or "meta nftrace set 1", marked. The kernel sends
// every rule that matched, with its verdict, to the multicast group NFTRACE.
//
// What the packet looks like comes once for each built-in chain it enters, with
// conntrack's id from Linux 6.16 on; the messages after it carry the trace id
// alone. There are no time stamps and no sequence numbers: what is lost is
// counted exactly by the kernel's drop column, for each message is a datagram of
// its own.
package nftrace

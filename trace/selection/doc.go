// Package selection tells the kernel which packets to trace: a chain of our own
// in the table raw with TRACE rules, and sets of addresses that they refer to.
// The entries of the sets time out unless they are refreshed, so that whatever
// becomes of us nothing is traced for long; the rules alone match nothing.
//
// With iptables-nft the rules that trace TCP stand a second time in a table of their own
// before raw, so that what others put before ours is seen as well. The kernel removes
// that table with its owner.
//
// A Service's addresses are in one set (packets to them), its endpoints in another
// (packets from them). By default only SYN and SYN-ACK are traced, of other
// protocols the first packet each way, and no more than Config.Rate a second.
package selection

// Package wire sees packets on the node's devices, before and after netfilter,
// by AF_PACKET sockets of gopacket's pcapgo, one for each device. Their filter
// lets through what begins a connection to or from the ports in question; it
// cannot know addresses, for those differ before and after translation.
//
// The sockets are never waited on: the kernel's count of packets says how many can
// be read, which is looked at on a tick. Each packet has the kernel's time.
package wire

// Package ctevent reads the kernel's connection tracking events: an entry was
// made (NEW) and an entry is gone (DESTROY). They tell which endpoint a
// connection really went to and how many bytes it carried.
//
// Updates are left out: they are five of seven events, and a group is on or
// off for the whole network namespace. A DESTROY may come minutes after the
// connection was closed, so it says how much was sent and not when it ended.
//
// The kernel may drop events of a full socket and counts each; the Source
// never asks it to hold them back (NETLINK_BROADCAST_ERROR), because a tracer
// that stands still would then fill the table and cost other people's
// packets. Lost DESTROYs are repaired by a dump, see conntrack.Conn and Entry.
//
// An entry made before Run was ready gives no events where
// nf_conntrack_events is 2, the default since Linux 6.0: the kernel decides
// when it makes an entry, by whether anybody listens, on newer kernels in
// whatever network namespace.
package ctevent

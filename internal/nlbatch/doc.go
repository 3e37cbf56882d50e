// Package nlbatch writes many small netlink requests at once: hundreds in one
// system call, of which the kernel answers the last and those it refuses.
// Libraries send one request per entry and wait for each answer, which is what
// most of a large change costs.
//
// It speaks any netlink protocol whose kernel side works through a datagram
// message by message: generic netlink, nfnetlink, rtnetlink. The encoding is
// pure and builds everywhere; the socket is Linux only.
package nlbatch

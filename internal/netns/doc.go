// Package netns gives kptrace namespaces of its own, without root where the
// host allows it.
//
// NS is a network namespace held by a descriptor; nothing is named or
// mounted, so it is gone with its last user. Sandbox runs our own binary
// again in fresh network, pid and mount namespaces: as root without a user
// namespace, because inside one the kernel refuses forced socket buffers
// (SO_SNDBUFFORCE, and with it large iptables-nft commits) even to root; as
// an ordinary user with one, where uid 0 stands for the caller.
//
// A sandbox leaves nothing behind. Its first process is a small init of ours
// (pid 1 of the pid namespace) that dies with the launcher (PDEATHSIG),
// starts the program, reaps orphans, and ends with the program; the kernel
// kills whatever is left when a pid 1 ends (pid_namespaces(7)).
//
// A program that uses Reexec calls Init first of all in main; a test calls
// Main in TestMain. Linux only; elsewhere everything fails with
// errors.ErrUnsupported, and Init and Inside do nothing.
package netns

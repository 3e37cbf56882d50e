// Package umlguest runs our own binary in a kernel of its own: Debian's
// user-mode-linux, which boots as an ordinary process in about two seconds,
// without root, on the host's file system, and whose modules include ip_vs
// with every scheduler, dummy, ipset and sctp.
//
// The guest sees the host's files read-only. Its first process is this binary
// again (Init), which mounts what a kernel needs, loads modules itself
// (finit_module(2); no kmod is asked for), starts the program and carries its
// input, output, signals and exit code over one serial line, framed. On the
// host the guest lives in a Sandbox of internal/netns, so it dies with its
// launcher, and its memory is a tmpfs of that sandbox: nothing remains.
//
// What is different inside: one CPU whatever the host has, system calls some
// ten times slower, a 100 Hz clock, iptables-legacy only (the kernel has no
// nf_tables for IPv4), no BTF, no conntrack timestamps, and no network but
// what the program makes. A binary built with -race does not start. On a CPU with
// AMX nothing inside may use registers wider than SSE's; Go's and glibc's programs
// are told so.
//
// A program that uses Run calls Init first of all in main; a test calls Main
// in TestMain. Linux on x86 only; elsewhere everything fails with
// errors.ErrUnsupported, and Init and Inside do nothing.
package umlguest

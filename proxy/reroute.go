package proxy

import (
	"context"
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/conntrack"
)

// Rerouter is a Backend that can send a connection that nobody answers to
// another endpoint, where the kernel's own rules never do.
type Rerouter interface {
	Backend
	// Reroute has the next SYN of each connection go to another endpoint. It
	// touches no connection that was answered, and returns how many it moved.
	Reroute(context.Context, []Stuck) (moved int, err error)
	// ReapReroutes removes what Reroute left in the kernel and is over. Call
	// it every second or so.
	ReapReroutes(ctx context.Context, now time.Time) error
	// RerouteDestroyed is told of entries of connection tracking that are gone,
	// to count those that were answered in the moment before.
	RerouteDestroyed(conntrack.Tuple, conntrack.Status)
	// RerouteStats may be called at any time.
	RerouteStats() RerouteStats
}

// Stuck is a TCP connection whose SYN nobody answered.
type Stuck struct {
	Tuple conntrack.Tuple
	// Tried are the endpoints it was sent to, the last one last.
	Tried []netip.AddrPort
}

// RerouteStats counts what became of stuck connections.
type RerouteStats struct {
	// Moved were sent elsewhere. Answered were answered before that could be
	// done and left alone; Gone had no entry any more. Alone had no other
	// endpoint. Limited came when there were too many, Failed met an error.
	Moved, Answered, Gone, Alone, Limited, Failed uint64
	// Raced were answered between the last look at them and the moment they
	// were moved: those connections are lost.
	Raced uint64
	// Rules are connections with rules in the kernel at the moment.
	Rules int
}

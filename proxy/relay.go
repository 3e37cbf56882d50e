package proxy

import (
	"context"
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/conntrack"
)

// Relay is a Backend whose connections pass through this process: it accepts
// them and dials the endpoints itself.
type Relay interface {
	Backend
	// Run keeps what Apply made going until ctx ends, which is no error, and
	// then lets connections end for a while before it closes what is left.
	Run(ctx context.Context) error
	// Notify makes f learn what becomes of each connection, from many
	// goroutines at once. It must not block, and must not keep the event. Nil
	// is nobody. It may be called at any time.
	Notify(f func(*RelayEvent))
	// RelayStats may be called at any time.
	RelayStats() RelayStats
	// UDPFrontends are the UDP addresses of the Snapshot's Services and the
	// ports of this process that serve each.
	UDPFrontends(*Snapshot) conntrack.Frontends
}

// RelayEventKind says what a RelayEvent reports.
type RelayEventKind uint8

// The kinds, in the order in which they come for one connection.
const (
	// RelayPick: an endpoint was chosen and is about to be dialled. It comes
	// once per try.
	RelayPick RelayEventKind = iota + 1
	// RelayFailed: the try came to nothing; Failure says why.
	RelayFailed
	// RelayConnected: the endpoint answered; for UDP, with its first datagram.
	RelayConnected
	// RelayClosed: the connection is over; End says how.
	RelayClosed
)

// RelayFailure is why a try came to nothing.
type RelayFailure uint8

// The failures.
const (
	FailedRefused     RelayFailure = iota + 1 // RST or ICMP port unreachable
	FailedUnreachable                         // ICMP host or network unreachable, no route
	FailedTimeout                             // no answer within the dial limit
	FailedOther
)

// RelayEnd is how a connection ended.
type RelayEnd uint8

// The ends.
const (
	EndedByClient      RelayEnd = iota + 1 // its FIN came first
	EndedByEndpoint                        // its FIN came first
	EndedResetClient                       // RST of the client
	EndedResetEndpoint                     // RST of the endpoint
	EndedUnanswered                        // no endpoint could be reached in all tries
	EndedNoEndpoints                       // there was none to try
	EndedIdle                              // UDP: nothing came for the idle timeout
	EndedRefused                           // UDP: ICMP port unreachable
	EndedShutdown                          // the proxy, the Service or the endpoint went away
)

// RelayEvent is one thing that happened to one connection.
type RelayEvent struct {
	Kind RelayEventKind
	// ID numbers the connections of one process from 1.
	ID   uint64
	Time time.Time
	// Tuple is the connection as the client made it. Local is the address of
	// this process to which the kernel led it. FromNode says that the client
	// is the node itself.
	Tuple    conntrack.Tuple
	Local    netip.AddrPort
	FromNode bool
	// Tag stands for Service and endpoint, as Program.Index knows them.
	Tag Tag
	// Affinity is "none", "hit", "new", "expired" or "reset". For RelayPick.
	Affinity string
	// Age is how long ago the client was seen before, for a RelayPick with
	// affinity hit or expired, and how long nothing went through, for a
	// RelayClosed of UDP.
	Age time.Duration
	// Upstream is the client as the endpoint sees it. For RelayConnected.
	Upstream netip.AddrPort
	Failure  RelayFailure
	End      RelayEnd
	// Out and In are the bytes of payload carried so far, from the client
	// and to it. For RelayClosed.
	Out, In uint64
}

// RelayStats counts the work of a Relay since it was made.
type RelayStats struct {
	// Open and Sessions are the TCP connections and UDP sessions at the
	// moment, Listeners the ports.
	Open, Sessions, Listeners int
	// Accepted and Datagrams count what came from clients, SessionsMade the
	// UDP sessions.
	Accepted, SessionsMade, Datagrams uint64
	// Tries counts dials by their end, Retried the connections that needed
	// more than one, Unserved those that no try helped.
	Connected, Refused, Unreachable, TimedOut, Failed uint64
	Retried, Unserved                                 uint64
	// AffinityResets counts clients that lost their endpoint to a failed
	// dial, AffinityEvicted those forgotten because there were too many;
	// AffinityClients are those remembered at the moment.
	AffinityResets, AffinityEvicted uint64
	AffinityClients                 int
	// Out and In are payload bytes.
	Out, In uint64
	// Dropped counts datagrams that found no room for a session, Direct what
	// came to a port of ours without having been led there by our rules.
	Dropped, Direct uint64
	// Waits counts connections that had to wait for file descriptors, and
	// Exhausted how often the kernel refused one. Descriptors of
	// MaxDescriptors are in use.
	Waits, Exhausted            uint64
	Descriptors, MaxDescriptors int
	// PortRange is the range the ports come from, empty for the kernel's
	// choice; PortsFree are left of it.
	PortRange string
	PortsFree int
}

// Package node puts one node together: the proxy's Syncer, the tracer with its
// sources and correlator, and the relay that answers questions. One node is
// one network namespace, which it owns by a lock.
//
// The tracer runs beside the proxy. It may fail, stall or be restarted; it can
// neither stop nor delay a sync.
package node

import (
	"context"
	"log/slog"

	"github.com/kptrace/kptrace/proxy"
)

// Config says what a node does.
type Config struct {
	// Name is the node's name in Kubernetes, Version ours.
	Name, Version string
	// Backend programs the kernel. If it can say beforehand why it can't, or
	// which variant it chose, it is also a Preflighter.
	Backend proxy.Backend
	// State calls emit with Snapshots until ctx ends. It fails only if there
	// is nothing to start from.
	State func(ctx context.Context, emit func(*proxy.Snapshot)) error

	// Trace switches the tracer on, reading NFLogGroup.
	Trace      bool
	NFLogGroup uint16
	// MasqueradeMark is the packet mark of traffic to masquerade.
	MasqueradeMark uint32
	// HistoryFailures and HistorySuccesses bound the History; 0 means the
	// default of trace.HistoryConfig.
	HistoryFailures, HistorySuccesses int

	// Socket is where the relay listens.
	Socket string
	// StateDir keeps the lock and what sysctls were; the socket's folder if
	// empty.
	StateDir string
	// Undo is asked at the end: remove rules and set sysctls back? Nil means
	// no.
	Undo   func() bool
	Logger *slog.Logger

	// inject, in tests, is called before each batch of events is handled.
	inject func()
}

// Preflighter is a Backend that can tell before its first Apply whether it can
// run here.
type Preflighter interface {
	// Preflight returns which variant was chosen, why, and what stands in the
	// way.
	Preflight(context.Context) (variant, reason string, err error)
}

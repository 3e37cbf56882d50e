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
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/exporters/otlp"
	"github.com/kptrace/kptrace/exporters/prom"
	"github.com/kptrace/kptrace/proxy"
)

// Config says what a node does.
type Config struct {
	// Name is the node's name in Kubernetes, Version ours.
	Name, Version string
	// Backend programs the kernel, or if it is a proxy.Follower, watches what
	// another one does: then Services, health ports and kube-proxy's metrics are
	// the other one's, and a mode that was not asked for is nothing to mention. If it can say beforehand why it can't, or
	// which variant it chose, it is also a Preflighter.
	Backend proxy.Backend
	// Others removes what other modes may have left. It is asked once, when
	// the first sync has succeeded. Nil removes nothing.
	Others Cleaner
	// State calls emit with Snapshots until ctx ends. It fails only if there
	// is nothing to start from.
	State func(ctx context.Context, emit func(*proxy.Snapshot)) error
	// StateFrom says in a few words where State takes it from; StateNotes, if
	// not nil, what is not as it could be with that at the moment. Both are
	// for status.
	StateFrom  string
	StateNotes func() []string

	// Trace switches the tracer on, reading NFLogGroup.
	Trace      bool
	NFLogGroup uint16
	// ReadOnly changes nothing on the node: no sysctls, and no rules for paths.
	// What the Backend does is its own.
	ReadOnly bool
	// MasqueradeMark is the packet mark of traffic to masquerade.
	MasqueradeMark uint32
	// HistoryFailures and HistorySuccesses bound the History; 0 means the
	// default of trace.HistoryConfig.
	HistoryFailures, HistorySuccesses int

	// Reroute is how long a connection may stay without an answer before the
	// Backend, a proxy.Rerouter, sends it to another endpoint; zero is for
	// ever. It takes the tracer.
	Reroute time.Duration

	// Socket is where the relay listens.
	Socket string
	// HTTP says what else is served, and where.
	HTTP HTTPConfig
	// Metrics shapes the metrics about connections.
	Metrics prom.FlowConfig
	// RequestGroup is the NFLOG group to which the backend's rules report
	// requests that name a span; 0 if they do not.
	RequestGroup uint16
	// CheckEvery is how often the kernel is compared with what it should have,
	// for the metrics; 0 is never. Where a Program of ours has more rules than
	// CheckMaxRules, those of some Services are looked at each time, in turn.
	CheckEvery    time.Duration
	CheckMaxRules int
	// PathBuffer is the receive buffer for reports of paths in bytes, zero for what
	// the source thinks right. The kernel uses of it what has not been read.
	PathBuffer int
	// OTLP says where connections are exported to, nil nowhere.
	OTLP *otlp.Config
	// Wanted is the mode that was asked for, if another one runs because it
	// cannot, and Fallback why: for metrics and status.
	Wanted   proxy.Mode
	Fallback string
	// SyncPeriod is how long the kernel may lag behind at most, MinSyncPeriod
	// the least time between two syncs; zero means the Syncer's defaults.
	SyncPeriod, MinSyncPeriod time.Duration
	// HealthPorts limits the Services' health ports to those of this
	// namespace's addresses that are in one of the ranges; empty means all.
	HealthPorts []netip.Prefix
	// NoLocalhost leaves route_localnet as it is: without it there are no
	// NodePorts on 127.0.0.1.
	NoLocalhost bool
	// Sysctls are set at the start, below /proc/sys, and set back with what
	// else was changed. One that cannot be set ends the node.
	Sysctls []Sysctl
	// ServerHealth checks endpoints and keeps those out for a time that do not
	// answer; see package serverhealth.
	ServerHealth bool
	// StateDir keeps the lock and what sysctls were; the socket's folder if
	// empty.
	StateDir string
	// Events takes what is to be found at Kubernetes objects. It must not wait.
	// Nil means there is no API server to write to.
	Events func(proxy.ObjectEvent)
	// FailureEventsAfter is how long most connections to an endpoint, or to a
	// Service without one, must fail until an Event says so; 0 is never.
	FailureEventsAfter time.Duration
	// Undo is asked at the end: remove rules and set sysctls back? Nil means
	// no.
	Undo func() bool
	// Reconciled is called each time UDP entries were held against the
	// endpoints there are. Nil means nobody looks.
	Reconciled func(conntrack.Reconciled)
	Logger     *slog.Logger

	// inject, in tests, is called before each batch of events is handled.
	inject func()
}

// Sysctl is a kernel setting, named as "net/netfilter/nf_conntrack_max".
type Sysctl struct {
	Name, Value string
	// AtLeast leaves it as it is where it is a larger number already.
	AtLeast bool
	// Optional goes on without it where this namespace may not change it, as
	// with settings that belong to the whole machine.
	Optional bool
}

// Cleaner removes what was left on a node.
type Cleaner interface {
	Cleanup(context.Context) error
}

// Preflighter is a Backend that can tell before its first Apply whether it can
// run here.
type Preflighter interface {
	// Preflight returns which variant was chosen, why, and what stands in the
	// way.
	Preflight(context.Context) (variant, reason string, err error)
}

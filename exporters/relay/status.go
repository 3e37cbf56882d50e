package relay

import (
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// Status is what a node says of itself.
type Status struct {
	Version, Node string
	Mode          proxy.Mode
	// Flavour is the iptables flavour in use, FlavourReason why.
	Flavour, FlavourReason string
	PID                    int
	Started                time.Time
	// State is where state comes from, as "manifests /etc/state"; StateNotes
	// what is not as it could be with that, in sentences without full stop.
	State      string
	StateNotes []string
	// Synced is when the kernel was last brought up to date, SyncError what
	// went wrong since, empty if nothing did.
	Synced    time.Time
	SyncError string
	// Rules, Services and Endpoints count what is programmed.
	Rules, Services, Endpoints int
	// Problems are objects that could not be used, Skipped Services that are
	// left out on purpose.
	Problems []proxy.Problem
	Skipped  []proxy.Skipped
	Sources  []trace.SourceStats
	Table    TableStats
	Ring     trace.RingStats
	History  trace.HistoryStats
	// Losses is all that was lost since the start, by source and place.
	Losses []trace.Loss
	// Groups are the NFLOG groups in use.
	Groups []uint16
	// Sysctls are those this node changed and will set back.
	Sysctls []Sysctl
	// Paths says what is traced rule by rule at the moment, and what of a path
	// cannot be seen here and why, in sentences without full stop.
	Paths []string
	// Virtual are the virtual servers of IPVS with their statistics; empty in
	// other modes.
	Virtual []trace.VirtualServer
	// ConntrackEntries of at most ConntrackLimit are in the kernel's table.
	ConntrackEntries, ConntrackLimit int
	// Exports is what became of connections that are exported, one for each
	// signal.
	Exports []Export
	// Blind lists what this setup cannot see, in sentences without full stop.
	Blind []string
}

// Export is what became of the connections of one OTLP signal:
//
//	Seen = Unsampled + Dropped + Queued + Sent + Failed
type Export struct {
	// Signal is traces or logs, Endpoint where they go as far as a flag said
	// it, Protocol how.
	Signal, Endpoint, Protocol string
	// Dropped found no room among Capacity, Queued wait or are being sent,
	// Failed were refused or given up. Rejected counts spans or records that
	// were taken and not kept, Overrun updates that came too fast.
	Seen, Unsampled, Dropped, Queued, Capacity, Sent, Failed, Rejected, Overrun uint64
	// LastError is why the newest request failed. Failing is since when
	// nothing could be sent, zero if all is well.
	LastError            string
	LastErrorAt, Failing time.Time
}

// TableStats describes the table of flows in the making.
type TableStats struct {
	// Open of at most Max are held; Evicted had to go before their end.
	Open, Max int
	Evicted   uint64
}

// Sysctl is a kernel setting that was changed.
type Sysctl struct {
	Name, Before, Now string
}

package trace

import (
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

// Request asks a node for Flows.
type Request struct {
	Filter Filter
	// Since and Last ask for Flows that History holds, before any new ones:
	// those that began at Since or later (zero: no limit), of these the Last
	// ones (zero: all). With both zero none are sent.
	Since time.Time
	Last  int
	// Interval is how often at most a Flow that has not ended is sent anew;
	// zero sends every revision. A Flow that ends is sent at once.
	Interval time.Duration
	// Wait says that Services which do not exist are no error.
	Wait bool
	// Path asks for the paths of packets.
	Path PathRequest
	// Direct asks for connections to endpoints too that were made past the
	// Service.
	Direct bool
}

// Message is one thing a node tells a follower. Exactly one of the pointers
// is set. A stream begins with a Header and, if it ends in order, ends with
// an End.
type Message struct {
	// Node is who says it.
	Node   string
	Header *Header
	// Flow is a revision of a Flow that the Request selects; Gone says that
	// it no longer does, but an earlier revision was sent.
	Flow *Flow
	Gone bool
	Loss *Loss
	Idle *Idle
	End  *End
}

// Header says what a stream is about.
type Header struct {
	Node    string
	Mode    proxy.Mode
	Version string
	// Services are those the Request names, and Unknown those it names that
	// do not exist (yet).
	Services []ServiceInfo
	Unknown  []string
	// Since is the time from which History holds every Flow; FailuresSince
	// the same for failed ones.
	Since, FailuresSince time.Time
	// Blind lists what this setup cannot see, in sentences without full stop.
	Blind []string
	// Notes are other things worth knowing at the start.
	Notes []string
}

// ServiceInfo describes a Service port as it is at the moment.
type ServiceInfo struct {
	Name           proxy.PortName
	Type           string
	ClusterIP      netip.Addr
	Port, NodePort uint16
	// Ready of Total endpoints get new connections.
	Ready, Total int
	Affinity     time.Duration
}

// Idle is what a node knows when nothing was sent for a while: the facts from
// which silence can be explained.
type Idle struct {
	// For is how long nothing was sent.
	For      time.Duration
	Services []ServiceInfo
	// Rules is the number of tagged rules for these Services, or of all if
	// none was named.
	Rules int
	// Synced is when the kernel was last brought up to date, SyncError what
	// went wrong since.
	Synced    time.Time
	SyncError string
	// Last is when the newest Flow that History holds for the Request began;
	// zero if it holds none.
	Last time.Time
	// Others is how many Flows this node published since the stream began that
	// the Request does not select.
	Others uint64
	// Sources says what each source has read since the node started.
	Sources []SourceStats
	Blind   []string
	// Direct counts the connections past the Service since the stream began.
	Direct Direct
	// Findings are what a check has to say about these Services and the node.
	Findings []string
}

// End closes a stream.
type End struct {
	// Losses is all that was lost while the stream ran.
	Losses []Loss
	// Direct counts the connections past the Service while it ran, to the
	// endpoints of the Services that the Request names, whoever the client.
	Direct Direct
}

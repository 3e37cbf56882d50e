package trace

import (
	"net/netip"
	"strconv"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// Flow is all that is known of one connection to a Service. A published Flow
// is immutable; an update is a new Flow with the same ID and a higher Revision.
type Flow struct {
	ID       FlowID
	Revision uint32
	// Start is when the first packet was seen.
	Start time.Time
	// Node is the node that saw it.
	Node string

	// Tuple is the connection as the client made it. Reply is what answers
	// look like on arrival at the node, zero until known. CTID recurs; see
	// conntrack.Flow.
	Tuple, Reply conntrack.Tuple
	CTID         uint32

	Client  Peer
	Service ServiceRef
	// Backend is the endpoint in use, or the last one tried.
	Backend  Peer
	Decision Decision
	Attempts []Attempt

	Outcome Outcome
	// Reason is a stable code for what went wrong, empty where nothing did.
	Reason Reason
	// Cause is what of the Reason is this connection's own: the rule that dropped
	// it, how long the endpoint was gone. Empty where there is nothing to add.
	Cause string
	// Established is from the first SYN to the SYN-ACK as the node saw them,
	// and Duration from the first SYN to the first FIN or RST; for UDP from
	// the first datagram to the first reply, and to the last packet known.
	// Both are -1 while unknown.
	Established, Duration time.Duration
	// Out and In are valid only if Counted.
	Out, In conntrack.Counters

	// Paths are the ways of its first packets, in the order of their arrival,
	// where somebody asked for them; see PathRequest.
	Paths []Path
	// Missing says which evidence the outcome would need, for Unknown.
	Missing  string
	Evidence Evidence
	// Incomplete is set where a Loss overlaps the flow.
	Incomplete bool
	// IPVSState is the connection's state in the table of IPVS, as of the last
	// sample that held it; zero in other modes.
	IPVSState IPVSState
	// Existing marks a connection older than kptrace.
	Existing bool
	Counted  bool
	// Ended is set once the outcome is final. Bytes may still be corrected.
	Ended bool
	// Completed is set in exactly one revision of a Flow, the one that Ended
	// it: whoever counts or exports each connection once acts on that one.
	Completed bool

	// Carried are the first requests, at most MaxCarried, that named the span
	// which sent them; none unless looking for them is switched on. CarriedMore
	// counts those that came after.
	CarriedMore uint32
	Carried     []Carried
}

// FlowID identifies a flow within one node.
type FlowID uint64

// String returns the id as 13 characters that sort by time.
func (id FlowID) String() string {
	s := strconv.FormatUint(uint64(id), 32)
	for len(s) < 13 {
		s = "0" + s
	}
	return s
}

// ParseFlowID reads an id as String prints it.
func ParseFlowID(s string) (FlowID, error) {
	n, err := strconv.ParseUint(s, 32, 64)
	return FlowID(n), err
}

// Peer is one end of a flow with its names.
type Peer struct {
	Addr netip.AddrPort
	// Namespace and Pod name the pod, Node the node it runs on (or, without a
	// Pod, the node whose address this is), Workload the pod's owner, Zone the
	// topology zone it is in. Empty where unknown.
	Namespace, Pod, Node, Workload, Zone string
}

// ServiceRef is the Service port a client dialled, and how.
type ServiceRef struct {
	Name proxy.PortName
	// Addr is the address dialled.
	Addr netip.AddrPort
	Via  proxy.Via
}

// Decision is why the backend was chosen.
type Decision struct {
	// Known is false for connections older than kptrace, or where the
	// evidence was lost; Note then says which.
	Known bool
	// Forwarding is how IPVS sends packets to the endpoint, ForwardUnknown in
	// other modes too.
	Forwarding Forwarding
	Note       string
	Mode       proxy.Mode
	// Algorithm, Candidates, Policy and Excluded are as in proxy.Outcome.
	Algorithm  string
	Candidates int
	// Probability of this pick, 0 where it is not a matter of chance.
	Probability float64
	Policy      string
	Excluded    proxy.Excluded
	// Load is what the scheduler had to choose from, where it looks at that
	// and a sample was at hand; nil otherwise.
	Load     *Load
	Affinity Affinity
	// AffinityAge is how long ago the client was last seen by that Service
	// (for hit and expired), AffinityTimeout the Service's setting; 0 if none.
	AffinityAge, AffinityTimeout time.Duration
	// Masquerade is why the source was translated: see proxy.Choice; "no"
	// where it was not, empty where unknown.
	Masquerade string
	// SourceSeen is the client address as the backend sees it, zero until
	// known.
	SourceSeen netip.AddrPort
}

// Load is a sample of what an IPVS scheduler looks at. It was taken some time
// before the pick, so it explains a pick and does not prove it.
type Load struct {
	// Age is how long before the pick the sample was taken.
	Age time.Duration
	// Servers are those of the virtual server by address, and Picked the index
	// of the one that was picked, -1 if it was not there yet.
	Servers []ServerLoad
	Picked  int
}

// ServerLoad is one server in a Load: its established connections, all others
// that IPVS has for it, and its weight.
type ServerLoad struct {
	Addr                     netip.AddrPort
	Active, Inactive, Weight int
}

// Affinity is what session affinity did.
type Affinity string

// The affinity words.
const (
	AffinityNone    Affinity = "none"
	AffinityHit     Affinity = "hit"
	AffinityNew     Affinity = "new"
	AffinityExpired Affinity = "expired"
	AffinityEvicted Affinity = "evicted"
	AffinityReset   Affinity = "reset"
)

// Outcome is how a connection stands or ended.
type Outcome string

// The outcomes.
const (
	Open       Outcome = "open"       // answered, not ended
	Closed     Outcome = "closed"     // ended by FIN, or UDP gone idle
	Refused    Outcome = "refused"    // RST or ICMP before any answer
	Reset      Outcome = "reset"      // RST after an answer
	Unanswered Outcome = "unanswered" // no answer for a second, still trying
	Timeout    Outcome = "timeout"    // never answered, given up
	Rejected   Outcome = "rejected"   // refused by a rule of the proxy
	Dropped    Outcome = "dropped"    // dropped by a rule of the proxy
	Unknown    Outcome = "unknown"    // the evidence is missing
	Pending    Outcome = "pending"    // younger than a second and not answered
)

// Failed reports whether the outcome is one a user would call a failure.
func (o Outcome) Failed() bool {
	switch o {
	case Refused, Reset, Unanswered, Timeout, Rejected, Dropped:
		return true
	}
	return false
}

// Attempt is one try to reach one endpoint.
type Attempt struct {
	Endpoint Peer
	// Start is when it began; Outcome is established, refused, unreachable,
	// reset, unanswered, timeout or pending.
	Start   time.Time
	Outcome string
	// Latency is from the first SYN of the attempt to its answer, -1 without.
	Latency time.Duration
	// Retransmits counts SYNs after the first; the last of them came Resent
	// after Start.
	Retransmits int
	Resent      time.Duration
	// ICMP is the error as "host unreachable from 10.0.0.1", if any.
	ICMP string
	// Reason says why it failed, and Cause what of that is this try's own, as in
	// Flow. Only the userspace mode knows them of each try; empty elsewhere.
	Reason Reason
	Cause  string
}

// Direct reports that the client dialled the endpoint itself, past the Service,
// which only those are shown who ask for it.
func (f *Flow) Direct() bool { return f.Service.Via == proxy.ViaDirect }

// Retried reports whether more than one endpoint was tried.
func (f *Flow) Retried() bool { return len(f.Attempts) > 1 }

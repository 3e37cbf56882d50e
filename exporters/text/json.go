package text

import (
	"math"
	"net/netip"
	"strconv"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// SchemaVersion is the version of FlowJSON. It changes only if a field changes
// its meaning or goes; fields may be added at any time.
const SchemaVersion = 1

// FlowJSON is a Flow as -o json and jsonl print it. What is not known, or does
// not apply, is null.
type FlowJSON struct {
	SchemaVersion int           `json:"schemaVersion"`
	ID            string        `json:"id"`
	Time          time.Time     `json:"time"`
	Node          string        `json:"node"`
	Proto         string        `json:"proto"`
	Client        PeerJSON      `json:"client"`
	Service       ServiceJSON   `json:"service"`
	Backend       *PeerJSON     `json:"backend"`
	Decision      DecisionJSON  `json:"decision"`
	Attempts      []AttemptJSON `json:"attempts"`
	Outcome       trace.Outcome `json:"outcome"`
	Reason        trace.Reason  `json:"reason"`
	Cause         string        `json:"cause,omitempty"`
	EstablishedMs *Millis       `json:"establishedMs"`
	DurationMs    *Millis       `json:"durationMs"`
	BytesOut      *uint64       `json:"bytesOut"`
	BytesIn       *uint64       `json:"bytesIn"`
	PacketsOut    *uint64       `json:"packetsOut"`
	PacketsIn     *uint64       `json:"packetsIn"`
	// Path holds the hops of all packets whose path is known, Packets says
	// which packets these are.
	Path       []HopJSON    `json:"path,omitempty"`
	Packets    []PacketJSON `json:"packets,omitempty"`
	Evidence   []string     `json:"evidence"`
	Incomplete bool         `json:"incomplete"`

	Revision uint32 `json:"revision"`
	Ended    bool   `json:"ended"`
	Retried  bool   `json:"retried"`
	Existing bool   `json:"existing"`
	// Missing is the evidence that outcome unknown would need.
	Missing string `json:"missing,omitempty"`
}

// PeerJSON is one end of a flow.
type PeerJSON struct {
	IP        string `json:"ip"`
	Port      uint16 `json:"port"`
	Namespace string `json:"namespace,omitempty"`
	Pod       string `json:"pod,omitempty"`
	Node      string `json:"node,omitempty"`
	Workload  string `json:"workload,omitempty"`
	Zone      string `json:"zone,omitempty"`
}

// ServiceJSON is the Service port dialled.
type ServiceJSON struct {
	Namespace  string    `json:"namespace"`
	Name       string    `json:"name"`
	Port       string    `json:"port"`
	IP         string    `json:"ip"`
	PortNumber uint16    `json:"portNumber"`
	Via        proxy.Via `json:"via"`
}

// DecisionJSON is why the backend was chosen.
type DecisionJSON struct {
	Known      bool       `json:"known"`
	Note       string     `json:"note,omitempty"`
	Mode       proxy.Mode `json:"mode"`
	Algorithm  string     `json:"algorithm"`
	Candidates int        `json:"candidates"`
	// Probability is null where the pick was not a matter of chance.
	Probability         *float64       `json:"probability"`
	Excluded            ExcludedJSON   `json:"excluded"`
	Affinity            trace.Affinity `json:"affinity"`
	AffinityAgeMs       *Millis        `json:"affinityAgeMs,omitempty"`
	AffinityTimeoutMs   *Millis        `json:"affinityTimeoutMs,omitempty"`
	Policy              string         `json:"policy"`
	Masquerade          string         `json:"masquerade"`
	SourceSeenByBackend string         `json:"sourceSeenByBackend,omitempty"`
	// Load is what an IPVS scheduler had to choose from, sampled AgeMs before.
	Load *LoadJSON `json:"load,omitempty"`
	// Forwarding is how IPVS sends packets to the backend.
	Forwarding string `json:"forwarding,omitempty"`
	// IPVSState is the connection's state in the table of IPVS when last seen.
	IPVSState string `json:"ipvsState,omitempty"`
}

// LoadJSON is a sample of the servers of an IPVS virtual server.
type LoadJSON struct {
	AgeMs   *Millis          `json:"ageMs"`
	Servers []ServerLoadJSON `json:"servers"`
}

// ServerLoadJSON is one server: established and other connections, weight.
type ServerLoadJSON struct {
	Backend  string `json:"backend"`
	Active   int    `json:"active"`
	Inactive int    `json:"inactive"`
	Weight   int    `json:"weight"`
	Picked   bool   `json:"picked"`
}

// ExcludedJSON counts endpoints that were no candidates.
type ExcludedJSON struct {
	NotReady    int `json:"notReady,omitempty"`
	Terminating int `json:"terminating,omitempty"`
	OtherZone   int `json:"otherZone,omitempty"`
	NotLocal    int `json:"notLocal,omitempty"`
	Overlay     int `json:"overlay,omitempty"`
}

// AttemptJSON is one try to reach one endpoint.
type AttemptJSON struct {
	Backend     string     `json:"backend"`
	Pod         string     `json:"pod,omitempty"`
	Time        *time.Time `json:"time,omitempty"`
	Outcome     string     `json:"outcome"`
	LatencyMs   *Millis    `json:"latencyMs"`
	Retransmits int        `json:"retransmits"`
	ICMP        string     `json:"icmp,omitempty"`
	// Reason and Cause are known of a try by itself in userspace mode.
	Reason trace.Reason `json:"reason,omitempty"`
	Cause  string       `json:"cause,omitempty"`
}

// Millis is a duration in milliseconds, printed with at most three decimals.
type Millis float64

// MarshalJSON prints the number without an exponent.
func (m Millis) MarshalJSON() ([]byte, error) {
	return strconv.AppendFloat(nil, round(float64(m), 1e3), 'f', -1, 64), nil
}

func round(x, parts float64) float64 { return math.Round(x*parts) / parts }

// millis makes a Millis of d; nil if d is negative, which means unknown.
func millis(d time.Duration) *Millis {
	if d < 0 {
		return nil
	}
	m := Millis(float64(d) / float64(time.Millisecond))
	return &m
}

// ToJSON converts a flow.
func ToJSON(f *trace.Flow) FlowJSON {
	d := &f.Decision
	out := FlowJSON{
		SchemaVersion: SchemaVersion,
		ID:            f.ID.String(), Time: f.Start.UTC(), Node: f.Node,
		Proto:  f.Service.Name.Proto.String(),
		Client: peerJSON(&f.Client),
		Service: ServiceJSON{
			Namespace: f.Service.Name.Namespace, Name: f.Service.Name.Name, Port: f.Service.Name.Port,
			IP: addr(f.Service.Addr), PortNumber: f.Service.Addr.Port(), Via: f.Service.Via,
		},
		Decision: DecisionJSON{
			Known: d.Known, Note: d.Note, Mode: d.Mode, Algorithm: d.Algorithm, Candidates: d.Candidates,
			Excluded: ExcludedJSON(d.Excluded), Affinity: d.Affinity, Policy: d.Policy, Masquerade: d.Masquerade,
			Forwarding: d.Forwarding.String(), IPVSState: f.IPVSState.String(),
		},
		Attempts: make([]AttemptJSON, 0, len(f.Attempts)),
		Outcome:  f.Outcome, Reason: f.Reason, Cause: f.Cause,
		EstablishedMs: millis(f.Established), DurationMs: millis(f.Duration),
		Evidence: f.Evidence.Names(), Incomplete: f.Incomplete,
		Revision: f.Revision, Ended: f.Ended, Retried: f.Retried(), Existing: f.Existing, Missing: f.Missing,
	}
	if f.Tuple.Proto() != 0 {
		out.Proto = f.Tuple.Proto().String()
	}
	if f.Backend != (trace.Peer{}) {
		b := peerJSON(&f.Backend)
		out.Backend = &b
	}
	if d.Probability > 0 {
		p := round(d.Probability, 1e4)
		out.Decision.Probability = &p
	}
	if d.AffinityTimeout > 0 {
		out.Decision.AffinityTimeoutMs = millis(d.AffinityTimeout)
		if d.Affinity == trace.AffinityHit || d.Affinity == trace.AffinityExpired {
			out.Decision.AffinityAgeMs = millis(d.AffinityAge)
		}
	}
	if d.SourceSeen.IsValid() {
		out.Decision.SourceSeenByBackend = d.SourceSeen.String()
	}
	if l := d.Load; l != nil {
		out.Decision.Load = &LoadJSON{AgeMs: millis(l.Age), Servers: []ServerLoadJSON{}}
		for i, s := range l.Servers {
			out.Decision.Load.Servers = append(out.Decision.Load.Servers, ServerLoadJSON{
				Backend: s.Addr.String(), Active: s.Active, Inactive: s.Inactive, Weight: s.Weight, Picked: i == l.Picked,
			})
		}
	}
	if f.Counted {
		out.BytesOut, out.PacketsOut = &f.Out.Bytes, &f.Out.Packets
		out.BytesIn, out.PacketsIn = &f.In.Bytes, &f.In.Packets
	}
	if out.Evidence == nil {
		out.Evidence = []string{}
	}
	for _, a := range f.Attempts {
		out.Attempts = append(out.Attempts, AttemptJSON{
			Backend: addrPort(a.Endpoint.Addr), Pod: a.Endpoint.Pod, Time: when(a.Start), Outcome: a.Outcome,
			LatencyMs: millis(a.Latency), Retransmits: a.Retransmits, ICMP: a.ICMP,
			Reason: a.Reason, Cause: a.Cause,
		})
	}
	for i := range f.Paths {
		p := &f.Paths[i]
		out.Packets = append(out.Packets, packetJSON(p))
		out.Path = append(out.Path, hopsJSON(p)...)
	}
	return out
}

func peerJSON(p *trace.Peer) PeerJSON {
	return PeerJSON{
		IP: addr(p.Addr), Port: p.Addr.Port(), Namespace: p.Namespace, Pod: p.Pod, Node: p.Node, Workload: p.Workload, Zone: p.Zone,
	}
}

func when(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}

func addr(a netip.AddrPort) string {
	if !a.IsValid() {
		return ""
	}
	return a.Addr().String()
}

func addrPort(a netip.AddrPort) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

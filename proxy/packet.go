package proxy

import (
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/conntrack"
)

// Packet is the first packet of a connection, as a walk sees it.
type Packet struct {
	Proto    conntrack.Proto
	Src, Dst netip.AddrPort
	// FromNode says the packet was made on the node itself, so that it passes
	// OUTPUT and not PREROUTING.
	FromNode bool
	// In is the interface it came in by, empty if unknown.
	In string
}

// Tuple returns the packet's key.
func (p Packet) Tuple() conntrack.Tuple { return conntrack.NewTuple(p.Proto, p.Src, p.Dst) }

// Verdict is what becomes of a first packet.
type Verdict uint8

// The verdicts. Pass is a packet that no Service claims.
const (
	Pass Verdict = iota
	Forward
	Reject
	Drop
)

// String returns the verdict in lower case.
func (v Verdict) String() string {
	return [...]string{"pass", "forward", "reject", "drop"}[v&3]
}

// Via is the kind of address by which a client reached a Service.
type Via string

// The kinds of addresses.
const (
	ViaClusterIP    Via = "ClusterIP"
	ViaNodePort     Via = "NodePort"
	ViaExternalIP   Via = "ExternalIP"
	ViaLoadBalancer Via = "LoadBalancer"
	// ViaDirect is an endpoint's own address: no Service is involved.
	ViaDirect Via = "direct"
)

// Outcome is what a mode does with a packet: the prediction that `explain`
// prints, that tests hold against real packets, and from which the correlator
// takes odds and policy.
type Outcome struct {
	Verdict Verdict
	// Service and Via say what the packet was addressed to; Service is zero
	// for verdict Pass.
	Service PortName
	Via     Via
	// Choices are the endpoints it can reach; their probabilities add up to 1
	// for verdict Forward. They are what holds without an affinity entry.
	Choices []Choice
	// Steps is the way of a packet that reaches no endpoint; where there are
	// Choices, each has its own.
	Steps []Step
	// Algorithm is "random", "round-robin", an IPVS scheduler's name, or
	// "single" where there is nothing to choose.
	Algorithm string
	// Policy is the endpoint policy applied: "Cluster", "Local",
	// "terminating".
	Policy   string
	Excluded Excluded
	// Affinity is the Service's affinity timeout, zero for none.
	Affinity time.Duration
	// Reason is a stable code where Verdict is Reject or Drop.
	Reason string
}

// Choice is one endpoint a packet can reach.
type Choice struct {
	Endpoint    netip.AddrPort
	Probability float64
	// Masquerade is why the source is translated: "hairpin", "external",
	// "not-local", "all", "node"; empty where it is not.
	Masquerade string
	// Steps is the way there, rule by rule.
	Steps []Step
}

// Find returns the choice for an endpoint.
func (o *Outcome) Find(ep netip.AddrPort) (Choice, bool) {
	for _, c := range o.Choices {
		if c.Endpoint == ep {
			return c, true
		}
	}
	return Choice{}, false
}

// Step is one rule a packet met on its way.
type Step struct {
	Hook, Table, Chain string
	// Rule is the rule's number in its chain from 1, zero for a chain's end
	// or policy; Text is the rule as iptables-save prints it.
	Rule int
	Text string
	// Purpose is the rule's meaning in one sentence.
	Purpose string
	// Effect is "match", "jump", "return", "policy", or a verdict.
	Effect string
}

package trace

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/kptrace/kptrace/conntrack"
)

// Path is the way of one packet through one node, hop by hop: predicted by
// walking rules, or observed. Both are the same type so that they can be
// compared; see SameRules.
type Path struct {
	// Predicted says that the rules were walked for it and no packet was seen.
	Predicted bool
	// Number counts the packets of a flow whose path is known, from 1.
	Number int
	// Packet says which packet it is: "SYN", "SYN-ACK", "RST", "FIN", "ACK" or
	// "data" for TCP, otherwise the protocol's name in lower case.
	Packet string
	// Reply says that it goes against the direction in which the connection
	// was opened.
	Reply bool
	// Tuple is the packet before its first hop, Left as it left the node; Left
	// is zero where that is unknown, or where it did not leave.
	Tuple, Left conntrack.Tuple
	// CTID is conntrack's id of the connection, 0 where the kernel does not
	// tell (nf_tables traces: Linux 6.16).
	CTID uint32
	Hops []Hop
	// Probability is the chance of this way for a predicted path, 0 otherwise.
	Probability float64
	// Incomplete says that hops may be missing, and Note why, or whatever else
	// is worth knowing.
	Incomplete bool
	Note       string
}

// HopKind says what a Hop is.
type HopKind string

// The kinds of hops.
const (
	// HopRule is a rule that matched, HopEnd the end of a chain that was jumped
	// to, HopPolicy the policy of a built-in chain.
	HopRule   HopKind = "rule"
	HopEnd    HopKind = "end"
	HopPolicy HopKind = "policy"
	// HopWire is a device that the packet came in by or went out by, seen
	// outside of netfilter.
	HopWire HopKind = "wire"
	// HopIPVS and HopUserspace are the proxy in these modes.
	HopIPVS      HopKind = "ipvs"
	HopUserspace HopKind = "userspace"
	// HopRoute is the node routing the packet, HopConntrack connection tracking
	// translating it as it remembers; they show where they change it.
	HopRoute     HopKind = "route"
	HopConntrack HopKind = "conntrack"
	// HopDrop is the kernel freeing the packet with a reason, which is Text.
	HopDrop HopKind = "drop"
	// HopSocket is a socket of this node sending the packet, where there is something
	// to say of that.
	HopSocket HopKind = "socket"
)

// Hop is one thing a packet met on its way.
type Hop struct {
	Kind HopKind
	// Hook is prerouting, input, forward, output or postrouting, with BridgeHook
	// before it where it is a bridge's; for HopWire "in" or "out". Table and Chain
	// are empty where there are none.
	Hook, Table, Chain string
	// Rule is the rule's number in its chain from 1, Handle that of nf_tables;
	// 0 where unknown or where there is none. A chain's end has the number
	// behind its last rule.
	Rule, Handle uint64
	// Purpose is the hop's meaning for people, Text the rule as iptables-save
	// prints it, for HopDrop the kernel's reason.
	Purpose, Text string
	// Verdict is one of: match (the next rule follows), jump, goto, return,
	// accept, drop, reject, dnat, snat, masquerade, redirect, continue, and
	// unknown. A policy's is accept or drop, a drop's is drop.
	Verdict string
	// Target is the chain of a jump or goto.
	Target string
	// Changes are what is different of the packet after this hop.
	Changes []Change
	// Probability is the chance with which a rule matches that decides by
	// chance, 0 for others.
	Probability float64
	// Time is the kernel's clock, zero where it does not stamp. The stamp of a
	// rule is that of the packet's arrival at the node.
	Time time.Time
	// In and Out are the devices of the packet at this hop, PhysIn and PhysOut
	// the ports of a bridge; empty where there is none (yet).
	In, Out, PhysIn, PhysOut string
	// Mark is the packet's mark before this hop.
	Mark uint32
	// Source is what saw it; of no meaning in a predicted path.
	Source SourceID
}

// BridgeHook begins the name of a hook at which a bridge's own rules stand (tables
// of the family bridge, ebtables), whatever is in the packets. In and Out of such
// a Hop are ports.
const BridgeHook = "bridge "

// Bridge reports whether a hop is of a bridge's own rules.
func (h *Hop) Bridge() bool { return strings.HasPrefix(h.Hook, BridgeHook) }

// Untracks reports whether a hop is a rule that keeps the packet from connection
// tracking, where that has not seen it yet.
func (h *Hop) Untracks() bool {
	if h.Kind != HopRule {
		return false
	}
	if strings.HasSuffix(h.Text, "-j CT --notrack") || strings.HasSuffix(h.Text, "-j NOTRACK") {
		return true
	}
	words, _, _ := strings.Cut(h.Text, ` comment "`)
	return slices.Contains(strings.Fields(words), "notrack")
}

// Change is one field of a packet that a hop changed.
type Change struct {
	// Field is src, dst (address and port), mark, ttl or tos.
	Field string
	// Before and After are as printed: "10.96.0.10:80", "0x4000", "63". Before
	// is empty where it is not known.
	Before, After string
}

// Step is what identifies a hop of a rule whatever the ruleset's numbering:
// where it was and what it did.
type Step struct {
	Hook, Table, Chain, Text, Verdict string
}

// Steps returns the rules a packet met, in order: rules that matched and ends of
// chains. Policies of chains that hold no rule of interest, the wire, rules of
// bridges, which are not predicted, and other kinds of hops are left out, so that
// what remains of a predicted and of an observed path is the same if the prediction
// holds.
func (p *Path) Steps() []Step {
	var steps []Step
	for i := range p.Hops {
		h := &p.Hops[i]
		if h.Bridge() {
			continue
		}
		switch h.Kind {
		case HopRule, HopEnd:
			steps = append(steps, Step{h.Hook, h.Table, h.Chain, h.Text, h.Verdict})
		case HopPolicy:
			if h.Verdict == "drop" {
				steps = append(steps, Step{h.Hook, h.Table, h.Chain, "", h.Verdict})
			}
		}
	}
	return steps
}

// SameRules reports whether two paths met the same rules; if not, at is the
// first of their Steps that differs.
func (p *Path) SameRules(o *Path) (at int, same bool) {
	a, b := p.Steps(), o.Steps()
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i, false
		}
	}
	return min(len(a), len(b)), len(a) == len(b)
}

// Endpoint returns where the path's last translation of the destination leads,
// invalid if there is none.
func (p *Path) Endpoint() netip.AddrPort {
	var to netip.AddrPort
	for i := range p.Hops {
		for _, c := range p.Hops[i].Changes {
			if c.Field != "dst" {
				continue
			}
			if a, err := netip.ParseAddrPort(c.After); err == nil {
				to = a
			}
		}
	}
	return to
}

// Complete adds to the path of a flow's packet what only the flow knows: whether
// it is a reply, and the addresses with which it left where no rule and no device
// showed them. orig and reply are the flow's two tuples; reply may be zero.
func (p *Path) Complete(orig, reply conntrack.Tuple) {
	p.Reply = p.Tuple != orig
	if reply.IsZero() || len(p.Hops) == 0 {
		return
	}
	left := reply.Reverse() // what the endpoint sees
	if p.Reply {
		left = orig.Reverse()
	}
	at := -1
	for i := range p.Hops {
		h := &p.Hops[i]
		if h.Verdict == "masquerade" || h.Verdict == "snat" {
			at = i
		}
	}
	if at >= 0 && !slices.ContainsFunc(p.Hops[at].Changes, func(c Change) bool { return c.Field == "src" }) {
		hops := slices.Clone(p.Hops)
		hops[at].Changes = append(slices.Clip(hops[at].Changes), Change{
			Field: "src", Before: orig.Src().String(), After: reply.Dst().String(),
		})
		p.Hops = hops
	}
	last := p.Hops[len(p.Hops)-1]
	if hook := strings.TrimPrefix(last.Hook, BridgeHook); p.Left.IsZero() && hook == "postrouting" && last.Verdict != "drop" && last.Verdict != "reject" {
		p.Left = left
	}
}

// PathRequest asks for the paths of a follower's flows to be traced.
type PathRequest struct {
	// Packets is how many packets of each direction of a connection are
	// traced, from the first: 1 is the SYN and the SYN-ACK. 0 traces nothing,
	// AllPackets all of them.
	Packets int
}

// AllPackets is the value of PathRequest.Packets for all packets.
const AllPackets = -1

// Wanted reports whether anything is to be traced.
func (r PathRequest) Wanted() bool { return r.Packets != 0 }

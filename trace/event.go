package trace

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
)

// SourceID names a kind of evidence. It is a small number so that sets of
// sources fit in an Evidence.
type SourceID uint8

// The sources. See docs/architecture.md for what each can prove.
const (
	NFLog SourceID = iota
	Conntrack
	NFTrace
	LegacyTrace
	IPVS
	Userspace
	Wire
	Drops
	sourceCount
)

var sourceNames = [sourceCount]string{
	"nflog", "conntrack", "nftrace", "legacytrace", "ipvs", "userspace", "wire", "drop",
}

// String returns the source's name as it stands in outputs.
func (s SourceID) String() string {
	if s < sourceCount {
		return sourceNames[s]
	}
	return fmt.Sprintf("source%d", uint8(s))
}

// Evidence is a set of sources.
type Evidence uint16

// With returns e and s.
func (e Evidence) With(s SourceID) Evidence { return e | 1<<s }

// Has reports whether s is in e.
func (e Evidence) Has(s SourceID) bool { return e&(1<<s) != 0 }

// Names lists the sources in e in a fixed order.
func (e Evidence) Names() []string {
	var names []string
	for s := range sourceCount {
		if e.Has(s) {
			names = append(names, s.String())
		}
	}
	return names
}

// Frame is what a Source read from the kernel in one go: one receive's worth
// of bytes, the source, and our clock. It can be recorded, and a recording
// replays through the same Decoder.
type Frame struct {
	Source SourceID
	// Time is our wall clock when the bytes were read, in nanoseconds since
	// 1970, for events that carry no kernel time.
	Time int64
	// Data belongs to the Source and is valid only until the call that got
	// the Frame returns.
	Data []byte
}

// EventKind says what an Event reports.
type EventKind uint8

// The kinds. The first group comes from NFLOG rules of the same names, the
// second from connection tracking.
const (
	KindNone EventKind = iota
	KindPick
	KindMiss
	KindReject
	KindDrop
	KindSyn
	KindSynAck
	KindFin
	KindRst
	KindICMP
	KindReply
	// KindNew and KindDestroy are conntrack's events.
	KindNew
	KindDestroy
	// KindEntry is the answer to a question about one entry, or one entry of
	// a dump; KindGone says that the entry asked about no longer exists.
	KindEntry
	KindGone
	// KindTryFailed, KindConnected and KindRelayEnd come from the userspace
	// proxy, as does KindPick once for each of its tries.
	KindTryFailed
	KindConnected
	KindRelayEnd
	// KindServer is a sample of one server of an IPVS virtual server, and
	// KindTemplate of one persistence template: see IPVSSample.
	KindServer
	KindTemplate
	// KindState is a sample of one connection in the table of IPVS.
	KindState
	// KindInvalid is of an NFLOG rule again: a segment that connection tracking takes
	// for INVALID, on its way through the node.
	KindInvalid
)

var eventKinds = [...]string{
	"none", "pick", "miss", "reject", "drop", "syn", "synack", "fin", "rst", "icmp", "reply",
	"new", "destroy", "entry", "gone", "try-failed", "connected", "relay-end", "server", "template", "state", "invalid",
}

// String returns the kind in lower case.
func (k EventKind) String() string {
	if int(k) < len(eventKinds) {
		return eventKinds[k]
	}
	return fmt.Sprintf("kind%d", uint8(k))
}

// KindOf returns the event kind that a rule's tag stands for.
func KindOf(t proxy.TagKind) EventKind {
	switch t {
	case proxy.TagPick:
		return KindPick
	case proxy.TagMiss:
		return KindMiss
	case proxy.TagReject:
		return KindReject
	case proxy.TagDrop:
		return KindDrop
	case proxy.TagSyn:
		return KindSyn
	case proxy.TagSynAck:
		return KindSynAck
	case proxy.TagFin:
		return KindFin
	case proxy.TagRst:
		return KindRst
	case proxy.TagICMP:
		return KindICMP
	case proxy.TagReply:
		return KindReply
	case proxy.TagInvalid:
		return KindInvalid
	}
	return KindNone
}

// Event is one decoded observation. It is a plain value of fixed size, apart
// from Rule, which points into an Index.
type Event struct {
	Kind   EventKind
	Source SourceID
	// Time is nanoseconds since 1970: the kernel's clock where KernelTime is
	// set, ours on reading otherwise.
	Time       int64
	KernelTime bool
	// Rule is the tagged rule that reported it; nil for conntrack's events
	// and for tags nobody knows.
	Rule *proxy.Rule
	// Tuple is the packet as it was at that hook, or an entry's original
	// tuple. For KindICMP it is the packet quoted inside the ICMP error.
	Tuple conntrack.Tuple
	// Reply is an entry's reply tuple; zero for packets.
	Reply conntrack.Tuple
	// IPVS is what a KindServer, KindTemplate or KindState says. Their Tuples
	// lead to the virtual server: from the server, or from the client (port 0
	// for a template). The Reply of the latter leads from the server to the
	// client.
	IPVS IPVSSample

	// The packet: TCP sequence and acknowledgement numbers and flags, skb mark (0 where
	// absent), interfaces by index (0 where absent), netfilter hook, IP id,
	// and for KindICMP the type and code, and the MTU if it is about that.
	TCPSeq, TCPAck     uint32
	Mark               uint32
	InDev, OutDev      uint32
	PhysIn, PhysOut    uint32
	Hook               uint8
	TCPFlags           uint8
	ICMPType, ICMPCode uint8
	IPID               uint16
	ICMPMTU            uint16
	ICMPFrom           [16]byte

	// The entry: see conntrack.Flow.
	CTID     uint32
	Status   conntrack.Status
	TCPState conntrack.TCPState
	// Timeout is the seconds left; in a KindDestroy zero means expired.
	Timeout     uint32
	Out, In     conntrack.Counters
	Start, Stop int64

	// Relayed is what only the userspace proxy knows, nil for other sources.
	// The Reply of its events is what its answers to the client look like on
	// arrival, Out and In hold bytes of payload.
	Relayed *Relayed
}

// Relayed is what the userspace proxy tells of a connection; see
// proxy.RelayEvent.
type Relayed struct {
	ID       uint64
	Failure  proxy.RelayFailure
	End      proxy.RelayEnd
	Affinity Affinity
	Age      time.Duration
	Upstream netip.AddrPort
}

// Forwarding is how a server gets its packets from IPVS.
type Forwarding uint8

// The forwarding methods (IP_VS_CONN_F_FWD_MASK in linux/ip_vs.h). Services
// need NAT: with the others the server must know the virtual address.
const (
	ForwardUnknown Forwarding = iota
	ForwardNAT
	ForwardLocal
	ForwardTunnel
	ForwardDirect
)

// String returns the method as people call it, empty if it is not known.
func (f Forwarding) String() string {
	switch f {
	case ForwardNAT:
		return "NAT"
	case ForwardLocal:
		return "local"
	case ForwardTunnel:
		return "tunnel"
	case ForwardDirect:
		return "direct routing"
	}
	return ""
}

// IPVSState is the state of a connection in the table of IPVS, which sees
// only the half of a connection that passes it, and times out by it.
type IPVSState uint8

// ipvsStates are the states of all protocols (ip_vs_proto_tcp.c, _udp.c and
// _sctp.c); the first is none.
var ipvsStates = [...]string{
	"", "NONE", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT", "TIME_WAIT", "CLOSE", "CLOSE_WAIT",
	"LAST_ACK", "LISTEN", "SYNACK", "UDP", "INIT1", "INIT", "COOKIE_SENT", "COOKIE_REPLIED", "COOKIE_WAIT",
	"COOKIE", "COOKIE_ECHOED", "SHUTDOWN_SENT", "SHUTDOWN_RECEIVED", "SHUTDOWN_ACK_SENT", "REJECTED", "CLOSED",
	"ASSURED", "ERR!",
}

// ParseIPVSState reads a state as the kernel prints it; zero is one that is not
// known.
func ParseIPVSState(word []byte) IPVSState {
	for i, name := range ipvsStates {
		if i > 0 && name == string(word) {
			return IPVSState(i)
		}
	}
	return 0
}

// String returns the state as the kernel prints it, empty if it is not known.
func (s IPVSState) String() string {
	if int(s) < len(ipvsStates) {
		return ipvsStates[s]
	}
	return ""
}

// IPVSSample is what the kernel said of a server, or of a client's template, at
// the time of the Event. It may be seconds old when it is used.
type IPVSSample struct {
	// Active are established connections, Inactive all others, as schedulers
	// count them.
	Active, Inactive uint32
	Weight           uint32
	// Method is how the server gets its packets, one of the Forward words.
	Method Forwarding
	// Left is how long a template or connection still lasts, in seconds.
	Left  uint32
	State IPVSState
}

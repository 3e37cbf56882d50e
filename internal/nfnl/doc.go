// Package nfnl is the nfnetlink framing under kptrace's hot streams: a raw
// NETLINK_NETFILTER socket, a receive loop that costs one wakeup per tick and
// not one per message, and iterators over messages and attributes that do not
// allocate. The iterators build everywhere; the socket is Linux only.
//
// A general netlink library peeks at, reads and allocates every message by
// itself, which is most of what a busy stream costs; see docs/architecture.md.
package nfnl

// Subsystems of nfnetlink (linux/netfilter/nfnetlink.h). A message's type is
// the subsystem in the upper byte and its own message number in the lower.
const (
	SubsysConntrack = 1
	SubsysULog      = 4
	SubsysNFTables  = 10
)

// The multicast groups of conntrack events (linux/netfilter/nfnetlink.h).
const (
	GroupConntrackNew     = 1
	GroupConntrackUpdate  = 2
	GroupConntrackDestroy = 3
)

// GroupNFTables is the multicast group of changes to nf_tables.
const GroupNFTables = 7

// GroupNFTrace is the multicast group of nf_tables' traces.
const GroupNFTrace = 9

// Address families as they stand in an nfgenmsg, which are Linux's numbers on
// every system that decodes a recording.
const (
	FamilyUnspec = 0
	FamilyIPv4   = 2
	FamilyBridge = 7
	FamilyIPv6   = 10
)

// Flags of a netlink message (linux/netlink.h).
const (
	FlagRequest = 0x1
	FlagAck     = 0x4
	FlagExcl    = 0x200
	FlagDump    = 0x300
	FlagCreate  = 0x400
)

// Lengths of the fixed headers in bytes.
const (
	HeaderLen    = 16 // struct nlmsghdr
	GenHeaderLen = 4  // struct nfgenmsg
	attrLen      = 4  // struct nlattr
)

// Message types every netlink protocol has (linux/netlink.h).
const (
	typeNoop  = 1
	typeError = 2
	typeDone  = 3

	// typeBatchBegin and typeBatchEnd are nfnetlink's own.
	typeBatchBegin = 0x10
	typeBatchEnd   = 0x11
)

// Type returns the netlink type of a subsystem's message.
func Type(subsys, msg uint8) uint16 { return uint16(subsys)<<8 | uint16(msg) }

func align(n int) int { return (n + 3) &^ 3 }

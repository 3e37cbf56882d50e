package conntrack

import "time"

// Status holds the IPS_* bits of an entry (linux/netfilter/nf_conntrack_common.h).
type Status uint32

// The bits kptrace looks at.
const (
	SeenReply Status = 1 << 1
	Assured   Status = 1 << 2
	Confirmed Status = 1 << 3
	SrcNAT    Status = 1 << 4
	DstNAT    Status = 1 << 5
	Dying     Status = 1 << 9
)

// TCPState is the state the tracker gives a TCP entry
// (linux/netfilter/nf_conntrack_tcp.h). Zero is "none" or "not TCP".
type TCPState uint8

// The states, in the kernel's numbering.
const (
	TCPNone TCPState = iota
	TCPSynSent
	TCPSynRecv
	TCPEstablished
	TCPFinWait
	TCPCloseWait
	TCPLastAck
	TCPTimeWait
	TCPClose
	TCPSynSent2
)

// String returns the name the conntrack tool prints.
func (s TCPState) String() string {
	names := [...]string{
		"NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT",
		"CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE", "SYN_SENT2",
	}
	if int(s) < len(names) {
		return names[s]
	}
	return "UNKNOWN"
}

// Counters are the packets and bytes of one direction, as nf_conntrack_acct
// counts them: bytes from the IP header on. They are zero where accounting
// was off when the entry was made.
type Counters struct {
	Packets, Bytes uint64
}

// Flow is one entry of the kernel's table.
type Flow struct {
	// Orig is the connection as its client sees it; Reply is what answers
	// look like on arrival, so it names the endpoint and the address the
	// endpoint sees as its client.
	Orig, Reply Tuple
	// ID recurs: the kernel may give the next connection the same one. It
	// identifies an entry only together with the time of its creation.
	ID     uint32
	Status Status
	State  TCPState
	// Timeout is the time left. In a DESTROY event zero means the entry
	// expired, and more that it was removed early.
	Timeout time.Duration
	Mark    uint32
	// Out counts the original direction, In the reply direction.
	Out, In Counters
	// Start and Stop are kernel wall-clock times, zero where
	// nf_conntrack_timestamp was off or the kernel has none.
	Start, Stop time.Time
}

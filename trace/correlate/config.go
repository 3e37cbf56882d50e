package correlate

import (
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// Config is what a Correlator needs. The zero value works and tells nobody.
type Config struct {
	// Node is the node's name, for Flow.Node and for clients on the node.
	Node string
	// MaxFlows bounds the flows kept, open and ended together; default
	// 65,536. A flow takes about 1.7 KB here, of which 1.1 KB is the last
	// update, shared with whoever got it. The oldest ended flow goes first,
	// then the oldest open one.
	MaxFlows int
	// MaxAffinity bounds the clients remembered for affinity words; default
	// 65,536, about 250 bytes each.
	MaxAffinity int
	// RecentList is how many clients the kernel's list of one endpoint keeps;
	// default 100 (ip_list_tot of xt_recent).
	RecentList int
	// MasqueradeMark is the packet mark that asks for source NAT; default
	// 0x4000.
	MasqueradeMark uint32
	// Views returns the generations of intent, newest first; nil for none.
	// It is called for each pick and must be cheap.
	Views func() []*proxy.View
	// Emit gets every update. The Flow is immutable; it must not call back.
	Emit func(*trace.Flow)
	// Watched says whether anybody looks at updates as they come. While it
	// says false, those of flows that have neither failed nor ended are put
	// together for up to a second, and no entry is asked for its counters: the
	// DESTROY brings them, and one look at those that last longer than 0.8 s. It is called for each update and must be cheap. Nil
	// is always.
	Watched func() bool
	// Counters says whether the counters of a flow that is about to end are
	// wanted at once, although nobody looks. Nil is never.
	Counters func(*trace.Flow) bool
	// Paths says whether paths of packets come, so that flows which have ended
	// wait for theirs. Nil is never.
	Paths func() bool
	// Ask asks for the entry with this original tuple. The answer comes as an
	// Event of KindEntry or KindGone. False means not now. Nil is never.
	Ask func(conntrack.Tuple) bool
	// Inquire is told once of each failed flow whose first packet did not leave the
	// node, or went elsewhere than to an endpoint, or whose answer was not seen or got
	// lost, and of each whose segments are INVALID to connection tracking. It must not
	// call back: who can find out why tells Correlator.Explain later. Nil is nobody.
	Inquire func(Inquiry)
	// Direct says whether connections past Services are shown; they are counted
	// anyway. Nil is never.
	Direct func() bool
	// Local reports whether an address is of one of the node's interfaces. Nil asks
	// the state alone.
	Local func(netip.Addr) bool
	// EntriesDecide says that no rule reports picks, so that entries of
	// connection tracking alone tell of connections.
	EntriesDecide bool
	// Hold is how long one source waits for the other; default 150 ms.
	Hold time.Duration
	// UnansweredAfter is when a pending flow becomes unanswered; default 1 s.
	UnansweredAfter time.Duration
	// GiveUpAfter is how long after its last SYN an unanswered connection is
	// taken for given up; default 30 s.
	GiveUpAfter time.Duration
	// IdleAfter is how long an open flow may be silent before its entry is
	// asked for, in case its end was lost; default 1 min, doubled each time
	// up to 1 h.
	IdleAfter time.Duration
}

// Inquiry is a failed flow of which packets and entries do not tell the cause.
type Inquiry struct {
	Flow *trace.Flow
	// Device is the interface its first packet came in by, 0 if that is not known.
	Device uint32
	// AnswerDevice is the one its answer came in by, ISN the sequence number of its
	// SYN; 0 if that is not known.
	AnswerDevice, ISN uint32
	// Invalid is a segment of it that connection tracking took for INVALID again and
	// again; zero if that is not what is asked.
	Invalid conntrack.Tuple
	// Elsewhere says that it was sent to what is no endpoint, and not dropped.
	Elsewhere bool
	// Try is the number of the try of the userspace proxy that failed, 1 being the
	// first; 0 in other modes. Then the answer goes to ExplainTry.
	Try int
}

const (
	finWait       = int64(40 * time.Millisecond)  // for the second FIN
	settleWait    = int64(5 * time.Millisecond)   // for the last ACK to be counted
	askWait       = int64(200 * time.Millisecond) // for an answer
	askAgain      = int64(10 * time.Second)       // after Ask said no
	askMost       = int64(time.Hour)
	directAsk     = int64(2 * time.Second)
	udpExpiry     = int64(31 * time.Second)     // a new UDP entry's life and a little
	unwatchedWait = int64(time.Second)          // for more to tell of a flow
	inquiryWait   = int64(5 * time.Second)      // for the answer to an Inquiry about a try
	raceWindow    = int64(5 * time.Millisecond) // between datagrams that decide at once
	endedKept     = int64(5 * time.Minute)      // for the DESTROY of an ended flow
	stampSlack    = int64(5 * time.Millisecond) // between two clocks of one packet
	startDump     = int64(10 * time.Second)     // entries this early come from the first dump
	// maxGenerations bounds the connections kept of one tuple.
	maxGenerations = 8
	maxHeld        = 8192
	maxWalks       = 16384
)

func (c *Config) setDefaults() {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&c.Hold, 150*time.Millisecond)
	def(&c.UnansweredAfter, time.Second)
	def(&c.GiveUpAfter, 30*time.Second)
	def(&c.IdleAfter, time.Minute)
	if c.MaxFlows <= 0 {
		c.MaxFlows = 65536
	}
	if c.MaxAffinity <= 0 {
		c.MaxAffinity = 65536
	}
	if c.RecentList <= 0 {
		c.RecentList = 100
	}
	if c.MasqueradeMark == 0 {
		c.MasqueradeMark = 0x4000
	}
	if c.Views == nil {
		c.Views = func() []*proxy.View { return nil }
	}
	if c.Watched == nil {
		c.Watched = func() bool { return true }
	}
	if c.Counters == nil {
		c.Counters = func(*trace.Flow) bool { return false }
	}
	if c.Direct == nil {
		c.Direct = func() bool { return false }
	}
	if c.Local == nil {
		c.Local = func(netip.Addr) bool { return false }
	}
	if c.Emit == nil {
		c.Emit = func(*trace.Flow) {}
	}
}

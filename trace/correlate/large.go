package correlate

import (
	"fmt"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

const (
	// firstLook is how long after its answer a TCP connection's counters are looked at,
	// if it lasts that long: once, to have something to hold its end against.
	firstLook = int64(800 * time.Millisecond)
	// ackedBy is how long a packet that passed the node may take to be acknowledged
	// there. TCP waits for half a second at most (RFC 9293, 3.8.6.3).
	ackedBy = int64(time.Second)
	// largeLeast is how many bytes of payload must be without acknowledgement, and
	// largeMean how large packets must be on the average, empty ones included.
	largeLeast, largeMean = 1000, 400
)

// large is what is known of a connection's payload that is not acknowledged.
type large struct {
	// lookDue is when its entry is looked at, lookedAt when it was, out and in what
	// its counters were then.
	lookDue, lookedAt int64
	out, in           conntrack.Counters
	// answerSeq is the sequence number of the SYN-ACK.
	answerSeq uint32
	// suspect says that who ended the connection had not acknowledged what passed the
	// node long before, fromReply that it was the endpoint, acked what it had.
	suspect, fromReply bool
	acked              uint32
}

// look asks for an entry's counters when it is time.
func (c *Correlator) look(r *rec, now int64) bool {
	if r.large.lookDue == 0 || now < r.large.lookDue {
		return false
	}
	r.large.lookDue = 0
	if c.ask(r) {
		r.large.lookedAt = now
	}
	return true
}

// looked takes the counters, or any that come before.
func (r *rec) looked(e *trace.Event) {
	if x := &r.large; x.lookedAt != 0 && x.in.Packets == 0 {
		x.lookedAt, x.out, x.in = e.Time, e.Out, e.In
	}
}

// payload is the least that counters of an entry mean in bytes beyond headers.
func payload(n conntrack.Counters, is4 bool) int64 {
	header := uint64(80) // of IPv6, and TCP with options
	if is4 {
		header = 60
	}
	return int64(n.Bytes) - int64(n.Packets*header)
}

// unacknowledged looks at the packet by which one side ends a connection: does it
// acknowledge what passed the node on the way to it long before?
func (r *rec) unacknowledged(e *trace.Event, fromReply bool) {
	x := &r.large
	if x.in.Packets == 0 || r.isn == 0 || x.answerSeq == 0 || e.Time-x.lookedAt < ackedBy || e.TCPFlags&flagACK == 0 {
		return
	}
	sent, begin := x.in, x.answerSeq+1
	if fromReply {
		sent, begin = x.out, r.isn+1
	}
	x.acked, x.fromReply = e.TCPAck-begin, fromReply
	x.suspect = x.acked < 1<<31 && payload(sent, r.orig.Is4())-int64(x.acked) >= largeLeast
}

// stuck says of a suspect, whose last counters are known, that large packets were sent
// to the side that ended it again after that look, without a word from there; empty if
// that was not so.
func (r *rec) stuck() string {
	x, f := &r.large, r.f
	sent, back, to := minus(f.In, x.in), minus(f.Out, x.out), r.orig.Src()
	all := f.In
	if x.fromReply {
		sent, back, to, all = back, sent, f.Backend.Addr, f.Out
	}
	// Back is the FIN or RST, and perhaps another.
	if !x.suspect || sent.Packets == 0 || back.Packets > 2 ||
		sent.Bytes < largeLeast || sent.Bytes/sent.Packets < largeMean {
		return ""
	}
	return fmt.Sprintf("of %d packets with %d bytes that went to %s, %d of them with %d bytes when it was silent, it acknowledged %d bytes when it ended the connection",
		all.Packets, all.Bytes, to, sent.Packets, sent.Bytes, x.acked)
}

func minus(a, b conntrack.Counters) conntrack.Counters {
	if a.Packets < b.Packets || a.Bytes < b.Bytes {
		return conntrack.Counters{}
	}
	return conntrack.Counters{Packets: a.Packets - b.Packets, Bytes: a.Bytes - b.Bytes}
}

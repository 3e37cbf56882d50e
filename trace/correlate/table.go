package correlate

import (
	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
)

// phase is where a record stands.
type phase uint8

const (
	held    phase = iota // an entry without a pick, shown to nobody
	pending              // not answered
	open                 // answered
	closing              // ended, the counters are being waited for
	ended                // final; waits for its DESTROY
	free
)

// rec is one connection: one generation of a tuple.
type rec struct {
	orig, reply conntrack.Tuple
	// f is the last update, which belongs to its readers, or, while dirty, the
	// next one, which is ours.
	f     *trace.Flow
	b     *box // what f is in
	dirty bool
	shown bool
	phase phase

	picked   bool // the decision was seen
	relayed  bool // by the userspace proxy, whose number it has for isn
	direct   bool // to an endpoint, past the Service
	refused  bool // by a rule: there is no entry to wait for
	existing bool // from the dump at start
	// newSeen says that the entry's creation was seen, destroyed and gone that
	// it is no more, counted that the counters are final.
	newSeen, destroyed, gone, counted bool
	// halfClosed says that the counters known may still grow.
	halfClosed bool
	// oldEntries counts entries of earlier attempts whose DESTROY is to come.
	oldEntries uint8
	// replyWait holds packets back until the reply tuple is known.
	replyWait bool
	// superseded says that another connection took the tuple meanwhile; what
	// was kept from keptFrom on and before keptUntil (0 is no end) is r's.
	superseded          bool
	keptFrom, keptUntil uint64
	keptSince           int64 // and not older than this
	asked               bool
	answered            bool
	finOut, finIn       bool
	pickExact           bool
	startUnknown        bool
	// untranslated says that the entry leads to the Service's own address, resumed
	// that it was made in mid-connection, for the one before had gone, and expired
	// that this one had expired, elsewhere
	// that it leads to what is no endpoint, inquired that Config.Inquire was told.
	untranslated, resumed, expired, elsewhere, inquired bool
	// left says that a UDP flow's endpoint has left its Service.
	left bool
	// device is the interface the first packet came in by, answerDevice the answer.
	device, answerDevice uint32
	// tooBigAt is when a packet was first said to be too large, and tooLarge what is
	// said if its sender does not heed that.
	tooBigAt int64
	tooLarge string
	large    large
	invalid  invalid
	// unacked is what is said if large packets were never acknowledged.
	unacked string
	// told is a reason that is known for certain, and settled says that it is
	// final; lostReplies counts SYNs after the answer.
	settled     bool
	lostReplies uint8
	told        trace.Reason
	// aside is what went wrong while the connection went on, nil if nothing is known.
	aside *aside
	// fate is what became on this node of the packet that was last sent to open the
	// connection, as its path shows, nil where it shows no end.
	fate *fate

	isn uint32
	// Times in nanoseconds; zero is unknown. newTime is set from kernel
	// clocks only, seenTime is when anything was seen first.
	pickTime, newTime, seenTime            int64
	start, tryStart, lastSyn, answerAt     int64
	endAt, lastEvent, askEvery, newArrived int64

	// What the DESTROY said.
	goneStatus conntrack.Status
	goneState  conntrack.TCPState
	goneEarly  bool

	place        *place // for paths that may come
	older, newer *rec
	prev, next   *rec
	in           *recList

	// Deadlines, zero for none; due is the least of them.
	holdDue, stateDue, flushDue, due, slotTime int64
	timerPrev, timerNext                       *rec
	slot                                       int32
	wheeled                                    bool
}

// aside is said of a connection that does not fail.
type aside struct {
	reason trace.Reason
	cause  string
}

func (r *rec) tcp() bool { return r.orig.Proto() == conntrack.TCP }

// recList is a list of records, oldest first.
type recList struct {
	first, last *rec
	n           int
}

func (l *recList) push(r *rec) {
	r.in, r.prev, r.next = l, l.last, nil
	if l.last != nil {
		l.last.next = r
	} else {
		l.first = r
	}
	l.last = r
	l.n++
}

func (l *recList) drop(r *rec) {
	if r.prev != nil {
		r.prev.next = r.next
	} else {
		l.first = r.next
	}
	if r.next != nil {
		r.next.prev = r.prev
	} else {
		l.last = r.prev
	}
	r.in, r.prev, r.next = nil, nil, nil
	l.n--
}

// find returns the newest generation of an original tuple.
func (c *Correlator) find(t conntrack.Tuple) *rec {
	if r := c.keys[t]; r != nil && r.orig == t {
		return r
	}
	return nil
}

// latest returns the latest generation that packets are of: one whose decision
// was seen, or that is shown without; nil if there is none.
func latest(r *rec) *rec {
	for ; r != nil && !r.picked && (!r.shown || r.refused); r = r.older {
	}
	return r
}

// oldest returns the oldest generation that ok accepts.
func oldest(r *rec, ok func(*rec) bool) *rec {
	var found *rec
	for ; r != nil; r = r.older {
		if ok(r) {
			found = r
		}
	}
	return found
}

// add makes a new generation of a tuple, whose newest one is known.
func (c *Correlator) add(t conntrack.Tuple, newest *rec, e *trace.Event) *rec {
	depth := 0
	for o := newest; o != nil; o = o.older {
		if depth++; depth == maxGenerations {
			c.evict(o)
			break
		}
	}
	if c.live.n+c.done.n >= c.cfg.MaxFlows {
		if c.done.first != nil {
			c.evict(c.done.first)
		} else {
			c.evict(c.live.first)
		}
		newest = c.find(t)
	}
	r := c.spare
	if r != nil {
		c.spare = r.next
		*r = rec{}
	} else {
		r = new(rec)
	}
	b := new(box)
	f := &b.flow
	f.Revision, f.Node, f.Tuple = 1, c.cfg.Node, t
	f.Established, f.Duration = -1, -1
	f.Outcome = trace.Pending
	f.Evidence = f.Evidence.With(e.Source)
	r.orig, r.b, r.f, r.dirty = t, b, f, true
	r.seenTime, r.lastEvent, r.start = e.Time, e.Time, e.Time
	if newest != nil {
		r.older, newest.newer = newest, r
	}
	c.keys[t] = r
	c.live.push(r)
	return r
}

// setReply makes packets that carry t as their tuple find r. A guess gives way
// to a living connection that has the tuple already.
func (c *Correlator) setReply(r *rec, t conntrack.Tuple, guess bool) {
	if r.reply == t {
		return
	}
	other := c.keys[t]
	if other != nil && (other.orig == t || guess && other.orig != r.orig && other.phase < closing) {
		if guess {
			return
		}
		if other.orig == t {
			r.reply = t
			return
		}
	}
	c.dropReply(r)
	r.reply = t
	c.keys[t] = r
}

// dropReply forgets the reply tuple, in favour of another generation with the
// same one.
func (c *Correlator) dropReply(r *rec) {
	if r.reply.IsZero() || c.keys[r.reply] != r || r.orig == r.reply {
		r.reply = conntrack.Tuple{}
		return
	}
	delete(c.keys, r.reply)
	for o := r.older; o != nil; o = o.older {
		if o.reply == r.reply && o.phase < ended {
			c.keys[o.reply] = o
			break
		}
	}
	r.reply = conntrack.Tuple{}
}

// remove takes r out of everything.
func (c *Correlator) remove(r *rec) {
	if r.place != nil {
		r.place.flow, r.place.r = r.f, nil
	}
	c.timers.set(r, 0)
	r.in.drop(r)
	c.dropReply(r)
	if r.older != nil {
		r.older.newer = r.newer
	}
	switch {
	case r.newer != nil:
		r.newer.older = r.older
	case r.older != nil:
		c.keys[r.orig] = r.older
	case c.keys[r.orig] == r:
		delete(c.keys, r.orig)
	}
	*r = rec{phase: free, next: c.spare}
	c.spare = r
}

// evict removes r to make room and says so.
func (c *Correlator) evict(r *rec) {
	if r.phase == closing {
		r.destroyed = true // as far as we shall know
		if !r.counted {
			c.stats.uncounted.Add(1)
		}
		c.finish(r)
		return
	}
	switch {
	case r.phase == ended:
		if !r.counted && !r.refused {
			c.stats.uncounted.Add(1)
		}
		c.publish(r)
	case r.shown:
		c.stats.evicted.Add(1)
		f := c.edit(r)
		f.Outcome, f.Reason, f.Missing = trace.Unknown, trace.NoReason, "evicted: the flow table was full"
		f.Ended, f.Completed = true, true
		c.stats.outcome(trace.Unknown)
		c.emit(r)
	default:
		c.stats.evicted.Add(1)
	}
	c.remove(r)
}

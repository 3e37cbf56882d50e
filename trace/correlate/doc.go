// Package correlate joins Events into Flows. It is a state machine without a
// goroutine and without a clock: it knows the time from its events and from
// Advance, so the same calls give the same flows, live or replayed.
//
// A connection is known by its original tuple while it lives. Several
// connections may follow each other on one tuple; each is a generation of its
// own. The two sources have no common order, but each has its own: NFLOG
// reports the generations' picks one after the other, and connection tracking
// reports NEW, DESTROY, NEW, DESTROY. So conntrack's events go to the oldest
// generation that lacks them, and packets to the latest one picked.
//
// What comes too early waits for Config.Hold: a NEW whose pick was not handed
// over yet is a flow nobody is shown, and the packets of a masqueraded
// connection, whose reply tuple only its NEW can tell, are kept aside.
//
// How connections end:
//
//   - An RST from the endpoint, or an ICMP error about the request, before any
//     answer: refused. Path MTU messages and redirects are no errors.
//   - A FIN: closed, by the time of the first. What follows does not change
//     that, an RST neither: a server that closes with unread data answers the
//     client's FIN that way.
//   - An RST after an answer and before a FIN: reset, by whoever sent it.
//   - An RST of the client before an answer: timeout, as the client gave up.
//   - No answer for Config.UnansweredAfter: unanswered; that and no SYN for
//     Config.GiveUpAfter, or the entry expired: timeout. An entry removed
//     early is waited for, because the next SYN makes a new one: an Attempt.
//   - UDP: the entry gone makes it closed, or timeout if nothing answered.
//   - SCTP: INIT ACK answers, SHUTDOWN closes, ABORT refuses or resets. Without
//     a pick nothing reports these: it is open until its entry is gone.
//   - A rule that refuses: rejected or dropped, at once.
//
// A DESTROY comes minutes late, so it decides only where no packet did. Where
// the packet that should have decided was lost, the outcome is unknown and
// Flow.Missing names it.
package correlate

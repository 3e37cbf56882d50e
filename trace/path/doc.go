// Package path joins what was seen of one packet, rule by rule, on the wire and
// where it was given up, into a trace.Path. It is pure: it has no goroutine, no
// clock and no kernel.
//
// A packet is known by what no translation changes: for TCP its sequence numbers,
// flags and IP id, for UDP its length, IP id and first bytes. Of the reports of
// nf_tables only the first in each built-in chain carries the packet; those
// after it are joined by the trace id until the next one does.
//
// Rules are looked up in the generation that was live when the packet met them:
// a handle of nf_tables is never given twice, a rule's number in legacy tables
// holds only until the next change.
package path

// Package trace is the vocabulary of observation: a Source reads Frames from
// the kernel, a Decoder makes Events of them, trace/correlate joins Events
// into Flows, a Ring carries Flows to Readers (text, metrics, spans, relay),
// a History keeps them, and a Filter selects. Loss says what was missed.
package trace

package trace

import "context"

// Source reads one stream of the kernel. A Source counts what it missed,
// never exits on ENOBUFS and never blocks a writer.
type Source interface {
	// ID says which stream it is.
	ID() SourceID
	// Run reads until ctx ends, which is no error, and hands each Frame to
	// emit. It calls ready once, when nothing that happens from then on can
	// be missed without being counted.
	Run(ctx context.Context, ready func(), emit func(Frame)) error
	// Stats may be called at any time from any goroutine.
	Stats() SourceStats
}

// Decoder makes Events of a Source's Frames. It is pure: the same Frames give
// the same Events, live or replayed.
type Decoder interface {
	// Decode appends the Frame's events to into. Damaged data is counted in
	// the Stats and never ends in a panic.
	Decode(f Frame, into []Event) []Event
}

// SourceStats counts a Source's work since it was made.
type SourceStats struct {
	Source SourceID
	// Frames, Bytes and Events count what was read.
	Frames, Bytes, Events uint64
	// Lost is the number of events known to be missed: from gaps in sequence
	// numbers and the kernel's drop counters. Overruns counts ENOBUFS.
	Lost, Overruns uint64
	// Foreign counts events that are not ours (tags of others), Damaged those
	// that could not be decoded.
	Foreign, Damaged uint64
	// ReceiveBuffer is the socket's buffer in bytes as the kernel granted it.
	ReceiveBuffer int
	// Note says what this source cannot do here and why, empty if all is well.
	Note string
}

// Loss is something known to have been missed in a span of time, so that a
// Flow that overlaps it can say how sure it is.
type Loss struct {
	Source SourceID
	// From and To are nanoseconds since 1970.
	From, To int64
	// Events is how many, at least 1.
	Events uint64
	// Where is "kernel", "queue" (between source and correlator), "ring"
	// (a reader was too slow), "table" (the flow table was full) or "rules" (others
	// had removed rules that report; how much these would have reported nobody
	// knows).
	Where string
}

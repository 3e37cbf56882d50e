package proxy

import "time"

// View is one generation of intent: a Snapshot, the Program made of it and the
// time from which the kernel may have been following it. Observers keep a few
// and choose by an event's time; see Syncer.Views.
type View struct {
	Mode     Mode
	Snapshot *Snapshot
	Overlay  Overlay
	Program  Program
	// From is when the commits began, so the first moment at which the
	// kernel may have used this View; Done is when the last one ended, zero
	// while they run.
	From, Done time.Time
	// Err is what could not be programmed, nil if all was.
	Err error
}

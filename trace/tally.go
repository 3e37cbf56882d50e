package trace

import (
	"fmt"
	"sync/atomic"
)

// Tally counts what a Source reads, for its Stats. Its methods may be called
// from any goroutine.
type Tally struct {
	source SourceID
	onLoss func(Loss)

	frames, bytes, events atomic.Uint64
	lost, overruns        atomic.Uint64
	receiveBuffer         atomic.Int64
	note                  atomic.Pointer[string]
}

// NewTally returns a Tally of nothing. onLoss is told of every Loss, from the
// goroutine that counts it; nil tells nobody.
func NewTally(source SourceID, onLoss func(Loss)) *Tally {
	return &Tally{source: source, onLoss: onLoss}
}

// Frame counts a Frame of so many bytes.
func (t *Tally) Frame(bytes int) {
	t.frames.Add(1)
	t.bytes.Add(uint64(bytes))
}

// Events counts what arrived.
func (t *Tally) Events(n uint64) { t.events.Add(n) }

// Overrun counts an ENOBUFS.
func (t *Tally) Overrun() { t.overruns.Add(1) }

// Lose counts events that were missed between from and to, nanoseconds since
// 1970, and tells of them; where is that of Loss.
func (t *Tally) Lose(from, to int64, events uint64, where string) {
	t.lost.Add(events)
	if t.onLoss != nil {
		t.onLoss(Loss{Source: t.source, From: from, To: to, Events: events, Where: where})
	}
}

// Buffer notes the receive buffer that was granted, in bytes, and returns what
// to say of it, which is nothing where it is no less than was wanted.
func (t *Tally) Buffer(granted, wanted int) (note string) {
	t.receiveBuffer.Store(int64(granted))
	if granted < wanted {
		note = fmt.Sprintf("receive buffer %d of %d bytes: not root of the machine, see net.core.rmem_max", granted, wanted)
	}
	return note
}

// Note says what the Source cannot do, in place of what it said before.
func (t *Tally) Note(note string) { t.note.Store(&note) }

// Stats returns the counts, with Foreign and Damaged as the decoder met them.
func (t *Tally) Stats(decoded SourceStats) SourceStats {
	s := SourceStats{
		Source: t.source,
		Frames: t.frames.Load(), Bytes: t.bytes.Load(), Events: t.events.Load(),
		Lost: t.lost.Load(), Overruns: t.overruns.Load(),
		Foreign: decoded.Foreign, Damaged: decoded.Damaged,
		ReceiveBuffer: int(t.receiveBuffer.Load()),
	}
	if note := t.note.Load(); note != nil {
		s.Note = *note
	}
	return s
}

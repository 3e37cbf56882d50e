package correlate

const (
	tickBits   = 24 // a slot is 2^24 ns, about 17 ms
	wheelSlots = 4096
)

// wheel holds records by the time they are due. Later times than its horizon
// of a minute wait in the last slot and are put in again. Moving a deadline
// further off costs nothing: the record finds out when its old one comes.
type wheel struct {
	slots [wheelSlots]*rec
	// at is the slot number up to which all was looked at.
	at int64
}

// start sets the time from which the wheel turns.
func (w *wheel) start(now int64) { w.at = now >> tickBits }

// set makes r come up at due, or never for 0.
func (w *wheel) set(r *rec, due int64) {
	r.due = due
	switch {
	case due == 0:
		w.unlink(r)
	case r.wheeled && r.slotTime <= due:
	default:
		w.unlink(r)
		w.link(r)
	}
}

func (w *wheel) link(r *rec) {
	tick := min(max(r.due>>tickBits, w.at), w.at+wheelSlots-1)
	r.slotTime, r.slot, r.wheeled = tick<<tickBits, int32(tick%wheelSlots), true
	head := &w.slots[r.slot]
	r.timerNext, r.timerPrev = *head, nil
	if *head != nil {
		(*head).timerPrev = r
	}
	*head = r
}

func (w *wheel) unlink(r *rec) {
	if !r.wheeled {
		return
	}
	if r.timerPrev != nil {
		r.timerPrev.timerNext = r.timerNext
	} else {
		w.slots[r.slot] = r.timerNext
	}
	if r.timerNext != nil {
		r.timerNext.timerPrev = r.timerPrev
	}
	r.timerPrev, r.timerNext, r.wheeled = nil, nil, false
}

// expired appends the records due at now to into and takes them out.
func (w *wheel) expired(now int64, into []*rec) []*rec {
	last := now >> tickBits
	if last < w.at {
		return into
	}
	from := max(w.at, last-wheelSlots+1)
	w.at = last
	for tick := from; tick <= last; tick++ {
		for r := w.slots[tick%wheelSlots]; r != nil; {
			next := r.timerNext
			switch {
			case r.due <= now:
				w.unlink(r)
				into = append(into, r)
			case tick != last || r.due>>tickBits != last:
				w.unlink(r)
				w.link(r)
			}
			r = next
		}
	}
	return into
}

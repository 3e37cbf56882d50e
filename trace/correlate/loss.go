package correlate

import "github.com/kptrace/kptrace/trace"

const maxLosses = 256

// lossList remembers spans in which evidence was lost; when it is full, the
// two oldest become one.
type lossList struct {
	spans []trace.Loss
	// last is the end of the latest span.
	last int64
}

// Lost tells that evidence is missing. Flows whose life overlaps it become
// Incomplete with their next update, and what only the missing evidence could
// tell becomes unknown.
func (c *Correlator) Lost(l trace.Loss) {
	if l.Where == "ring" || l.Where == "table" {
		return // what readers missed is no evidence
	}
	c.stats.losses.Add(1)
	x := &c.losses
	if len(x.spans) == maxLosses {
		x.spans[1].From = min(x.spans[0].From, x.spans[1].From)
		x.spans[1].To = max(x.spans[0].To, x.spans[1].To)
		x.spans = append(x.spans[:0], x.spans[1:]...)
	}
	x.spans = append(x.spans, l)
	x.last = max(x.last, l.To)
}

// overlap reports a loss within the span of time.
func (x *lossList) overlap(from, to int64) bool {
	if x.last < from || len(x.spans) == 0 {
		return false
	}
	for i := range x.spans {
		if x.spans[i].From <= to && x.spans[i].To >= from {
			return true
		}
	}
	return false
}

// of reports a loss by one source within the span of time.
func (x *lossList) of(s trace.SourceID, from, to int64) bool {
	if x.last < from {
		return false
	}
	for i := range x.spans {
		l := &x.spans[i]
		if l.Source == s && l.From <= to && l.To >= from {
			return true
		}
	}
	return false
}

package text

import (
	"bufio"
	"fmt"
	"slices"
	"time"

	"github.com/kptrace/kptrace/trace"
)

// screen keeps the last rows of a terminal up to date. Rows above those that
// can still change are written once and never touched again; it needs only
// "cursor up" and "erase line" (ECMA-48 CPL, EL and ED).
type screen struct {
	w    *bufio.Writer
	size func() (width, height int)
	// rows are those that may still be rewritten, oldest first. Of them the
	// first drawn lines are on the terminal, and those from dirty on differ.
	rows  []screenRow
	drawn int
	dirty int
	// status is a last line that stays below the rows; shown says that it is
	// on the terminal.
	status, drawnStatus string
	shown               bool
	width               int
}

type screenRow struct {
	key   key
	text  func(width int) string
	final bool
}

// add appends a row.
func (s *screen) add(k key, text func(int) string, final bool) {
	s.rows = append(s.rows, screenRow{k, text, final})
}

// update changes a row that is still there, and reports whether it is.
func (s *screen) update(k key, text func(int) string, final bool) bool {
	for i := len(s.rows) - 1; i >= 0; i-- {
		if s.rows[i].key == k && k != (key{}) {
			s.rows[i] = screenRow{k, text, final}
			s.dirty = min(s.dirty, i)
			return true
		}
	}
	return false
}

// note appends lines that do not change.
func (s *screen) note(lines ...string) {
	for _, l := range lines {
		s.add(key{}, func(width int) string { return cutColoured(l, width) }, true)
	}
}

// draw brings the terminal up to date.
func (s *screen) draw() {
	width, height := s.size()
	if width != s.width && s.drawn > 0 {
		// Lines may have wrapped: let go of what is there.
		s.rows = s.rows[s.drawn:]
		s.drawn, s.dirty = 0, 0
	}
	s.width = width
	from := min(s.dirty, s.drawn)
	if from < len(s.rows) || s.status != s.drawnStatus {
		up := s.drawn - from
		if s.shown {
			up++
		}
		if up > 0 {
			fmt.Fprintf(s.w, "\x1b[%dF", up)
		}
		for _, r := range s.rows[from:] {
			fmt.Fprint(s.w, r.text(width), "\x1b[K\n")
		}
		if s.status != "" {
			fmt.Fprint(s.w, cutColoured(s.status, width), "\x1b[K\n")
		}
		if s.shown || up > 0 {
			fmt.Fprint(s.w, "\x1b[J")
		}
		s.shown, s.drawnStatus = s.status != "", s.status
	}
	// Let go of the final rows at the top, and of what the terminal cannot
	// hold: the cursor cannot go back there.
	keep := max(1, height-3)
	drop := max(0, len(s.rows)-keep)
	for drop < len(s.rows) && s.rows[drop].final {
		drop++
	}
	s.rows = slices.Delete(s.rows, 0, drop)
	s.drawn = len(s.rows)
	s.dirty = s.drawn
}

// onTerminal shows a revision on a terminal.
func (r *renderer) onTerminal(k key, f *trace.Flow, first bool) {
	now := r.cfg.Now()
	row := r.row(f)
	if r.term.update(k, row, f.Ended) {
		return
	}
	bad := f.Outcome.Failed()
	switch {
	case first && !bad && !r.fold.allow(now):
		r.fold.add(k, f.Ended)
		return
	case first:
	case r.fold.forget(k, f.Ended || bad):
		if !bad {
			return // still one of many good ones
		}
	case !f.Ended:
		return // scrolled away; shown again when it ends
	}
	r.head()
	r.lastRow = now
	r.term.add(k, row, f.Ended)
}

// rowsPerSecond is how many good connections a second get a row of their own
// on a terminal: about what an eye can follow.
const rowsPerSecond = 20

// folder counts the connections without a row.
type folder struct {
	second  time.Time
	rows    int
	hidden  map[key]struct{} // not ended
	count   int              // in this burst
	begun   time.Time
	last    time.Time
	skipped int // in all
}

// allow reports whether one more row fits into this second.
func (x *folder) allow(now time.Time) bool {
	if now.Sub(x.second) >= time.Second {
		x.second, x.rows = now, 0
	}
	x.rows++
	if x.rows <= rowsPerSecond {
		return true
	}
	if x.count == 0 {
		x.begun = now
	}
	x.last = now
	return false
}

func (x *folder) add(k key, ended bool) {
	x.count++
	x.skipped++
	if ended {
		return
	}
	if x.hidden == nil {
		x.hidden = make(map[key]struct{})
	}
	x.hidden[k] = struct{}{}
}

// forget reports whether k was folded, and forgets it if over.
func (x *folder) forget(k key, over bool) bool {
	_, ok := x.hidden[k]
	if ok && over {
		delete(x.hidden, k)
	}
	return ok
}

// folded keeps the counter line, and writes it for good when the burst is over.
func (r *renderer) folded(now time.Time) {
	x := &r.fold
	if x.count == 0 {
		return
	}
	if now.Sub(x.last) > 2*time.Second {
		x.finish(r)
		return
	}
	rate := float64(x.count) / max(1, now.Sub(x.begun).Seconds())
	r.term.status = r.dim(fmt.Sprintf("… %s more, not failed, without a row of their own (%.0f/s); failures always get one",
		plural(x.count, "connection"), rate))
	r.lastRow = now
}

// finish ends a burst.
func (x *folder) finish(r *renderer) {
	if x.count > 0 {
		r.term.note(r.dim(fmt.Sprintf("… %s more, not failed, from %s to %s", plural(x.count, "connection"),
			x.begun.In(r.cfg.Location).Format("15:04:05"), x.last.In(r.cfg.Location).Format("15:04:05"))))
	}
	x.count = 0
	r.term.status = ""
}

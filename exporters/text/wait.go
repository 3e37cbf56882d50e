package text

import (
	"slices"
	"time"

	"github.com/kptrace/kptrace/trace"
)

const (
	// pathSettle is how long after a connection's end more paths may come, once that of
	// the packet that opened it is there.
	pathSettle = time.Second
	// pathGiveUp is when one without that is shown as it is: on a busy machine many
	// packets may have to be joined first.
	pathGiveUp = 8 * time.Second
	// pathOpen is when a connection that goes on is shown with its paths.
	pathOpen = 2 * time.Second
)

// waiting holds connections back until their paths are there.
type waiting struct {
	flows map[key]*awaited
	// shown are those whose paths were shown while they were open.
	shown map[key]bool
}

type awaited struct {
	flow *trace.Flow
	// since is when it came, ended when its end did.
	since, ended time.Time
}

// update takes a later revision of a connection that waits for its paths after
// its end.
func (w *waiting) update(k key, f *trace.Flow) bool {
	a := w.flows[k]
	if a == nil || !a.flow.Ended {
		return false
	}
	if f.Revision > a.flow.Revision {
		a.flow = f
	}
	return true
}

// await takes a revision of a connection whose paths were asked for.
func (r *renderer) await(k key, f *trace.Flow) {
	w := &r.waiting
	now := r.cfg.Now()
	if w.shown[k] {
		if f.Ended {
			delete(w.shown, k)
			r.show(k, withoutPaths(f))
		}
		return
	}
	a := w.flows[k]
	if a == nil {
		if w.flows == nil {
			w.flows, w.shown = make(map[key]*awaited), make(map[key]bool)
		}
		a = &awaited{since: now}
		w.flows[k] = a
	}
	a.flow = f
	if f.Ended && a.ended.IsZero() {
		a.ended = now
	}
}

// withoutPaths is a flow whose paths were shown already.
func withoutPaths(f *trace.Flow) *trace.Flow {
	c := *f
	c.Paths = nil
	return &c
}

// pathsDue shows the connections that need not wait any longer; all of them for
// the zero time.
func (r *renderer) pathsDue(now time.Time) {
	var due []key
	for k, a := range r.waiting.flows {
		has := slices.ContainsFunc(a.flow.Paths, func(p trace.Path) bool { return !p.Reply })
		switch {
		case now.IsZero() && a.flow.Ended:
		case now.IsZero():
			delete(r.waiting.flows, k) // shown with those that are left
			continue
		case a.flow.Ended && has && now.Sub(a.ended) >= pathSettle:
		case a.flow.Ended && now.Sub(a.ended) >= pathGiveUp:
		case r.cfg.Format == Path && !a.flow.Ended && has && now.Sub(a.since) >= pathOpen:
		default:
			continue
		}
		due = append(due, k)
	}
	slices.SortFunc(due, func(x, y key) int {
		return trace.CompareFlows(r.waiting.flows[x].flow, r.waiting.flows[y].flow)
	})
	for _, k := range due {
		a := r.waiting.flows[k]
		delete(r.waiting.flows, k)
		if !a.flow.Ended {
			r.waiting.shown[k] = true
		}
		r.show(k, a.flow)
	}
}

// trees prints the paths of a flow.
func (r *renderer) trees(f *trace.Flow) {
	for i := range f.Paths {
		r.write(Tree(&f.Paths[i]))
	}
}

package trace

import (
	"cmp"
	"slices"
	"sync"
	"time"
)

// HistoryConfig sets a History's bounds. Zero values mean the defaults.
type HistoryConfig struct {
	// Failures is how many failed Flows are kept whatever their age; 10,000.
	Failures int
	// FailureAge is how long failed Flows beyond that number are kept, if
	// there is room; 24 hours.
	FailureAge time.Duration
	// FailuresMax is the most failed Flows ever kept; four times Failures.
	FailuresMax int
	// Successes is how many other Flows are kept; 10,000.
	Successes int
	// Start is when watching began; now.
	Start time.Time
}

// History keeps the newest Flows. Failed ones are kept apart from the others,
// so that no flood of good connections pushes them out. It is safe for
// concurrent use, and Put is cheap enough for every revision of every Flow.
type History struct {
	cfg HistoryConfig

	mu    sync.Mutex // guards all below
	index map[FlowID]*entry
	// good and bad are lists by order of arrival, each with its sentinel.
	good, bad shelf
}

type entry struct {
	flow       *Flow
	prev, next *entry
	shelf      *shelf
}

// shelf is a list of entries, oldest first. since is the time from which on it
// holds every Flow that there was.
type shelf struct {
	root  entry
	len   int
	since time.Time
}

func (s *shelf) init(since time.Time) {
	s.root.prev, s.root.next = &s.root, &s.root
	s.since = since
}

func (s *shelf) push(e *entry) {
	last := s.root.prev
	e.prev, e.next, e.shelf = last, &s.root, s
	last.next, s.root.prev = e, e
	s.len++
}

func (s *shelf) remove(e *entry) {
	e.prev.next, e.next.prev = e.next, e.prev
	s.len--
}

// NewHistory makes an empty History.
func NewHistory(cfg HistoryConfig) *History {
	cfg.Failures = cmp.Or(cfg.Failures, 10_000)
	cfg.FailureAge = cmp.Or(cfg.FailureAge, 24*time.Hour)
	cfg.FailuresMax = max(cmp.Or(cfg.FailuresMax, 4*cfg.Failures), cfg.Failures)
	cfg.Successes = cmp.Or(cfg.Successes, 10_000)
	if cfg.Start.IsZero() {
		cfg.Start = time.Now()
	}
	h := &History{cfg: cfg, index: make(map[FlowID]*entry)}
	h.good.init(cfg.Start)
	h.bad.init(cfg.Start)
	return h
}

// Put keeps f, in place of earlier revisions of the same Flow. A revision
// older than the one held is ignored. Put must not be followed by changes to f.
func (h *History) Put(f *Flow) {
	h.mu.Lock()
	defer h.mu.Unlock()
	to := &h.good
	if f.Outcome.Failed() {
		to = &h.bad
	}
	if e, ok := h.index[f.ID]; ok {
		if f.Revision < e.flow.Revision {
			return
		}
		e.flow = f
		if e.shelf == to {
			return
		}
		e.shelf.remove(e)
		to.push(e)
	} else {
		e = &entry{flow: f}
		h.index[f.ID] = e
		to.push(e)
	}
	if to == &h.good {
		for to.len > h.cfg.Successes {
			h.evict(to)
		}
		return
	}
	for to.len > h.cfg.Failures {
		oldest := to.root.next.flow
		if to.len <= h.cfg.FailuresMax && f.Start.Sub(oldest.Start) < h.cfg.FailureAge {
			return
		}
		h.evict(to)
	}
}

// evict drops a shelf's oldest entry.
func (h *History) evict(s *shelf) {
	e := s.root.next
	s.remove(e)
	delete(h.index, e.flow.ID)
	if e.flow.Start.After(s.since) {
		s.since = e.flow.Start
	}
}

// Get returns the newest revision of one Flow.
func (h *History) Get(id FlowID) (*Flow, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	e, ok := h.index[id]
	if !ok {
		return nil, false
	}
	return e.flow, true
}

// Query returns the Flows that filter matches and that began at since or
// later (zero: all that are held), in the order in which they began; of these
// the last ones, if last is not zero.
func (h *History) Query(filter Filter, since time.Time, last int) []*Flow {
	flows := h.all()
	flows = slices.DeleteFunc(flows, func(f *Flow) bool {
		return f.Start.Before(since) || !filter.Match(f)
	})
	slices.SortFunc(flows, CompareFlows)
	if last > 0 && len(flows) > last {
		flows = flows[len(flows)-last:]
	}
	return flows
}

// CompareFlows orders Flows by the time they began, then by id.
func CompareFlows(a, b *Flow) int {
	if c := a.Start.Compare(b.Start); c != 0 {
		return c
	}
	return cmp.Compare(a.ID, b.ID)
}

// all copies the list, so that filtering and sorting need no lock.
func (h *History) all() []*Flow {
	h.mu.Lock()
	defer h.mu.Unlock()
	flows := make([]*Flow, 0, h.good.len+h.bad.len)
	for _, s := range []*shelf{&h.good, &h.bad} {
		for e := s.root.next; e != &s.root; e = e.next {
			flows = append(flows, e.flow)
		}
	}
	return flows
}

// HistoryStats describes a History's fill.
type HistoryStats struct {
	// Since is the time from which every Flow is held that there was;
	// FailuresSince the same for failed ones, which reach further back.
	Since, FailuresSince time.Time
	// Failures and Successes are how many are held, and Max how many may be.
	Failures, FailuresMax   int
	Successes, SuccessesMax int
}

// Stats may be called at any time.
func (h *History) Stats() HistoryStats {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := HistoryStats{
		Since: h.good.since, FailuresSince: h.bad.since,
		Failures: h.bad.len, FailuresMax: h.cfg.FailuresMax,
		Successes: h.good.len, SuccessesMax: h.cfg.Successes,
	}
	if s.FailuresSince.After(s.Since) {
		s.Since = s.FailuresSince
	}
	return s
}

// Since returns the true start of what is held: the time from which every
// Flow is there, and the same for failed Flows alone. Both are when watching
// began until something had to go.
func (h *History) Since() (all, failures time.Time) {
	s := h.Stats()
	return s.Since, s.FailuresSince
}

package trace

import (
	"testing"
	"time"
)

var epoch = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func flowAt(id FlowID, rev uint32, o Outcome) *Flow {
	return &Flow{ID: id, Revision: rev, Start: epoch.Add(time.Duration(id) * time.Second), Outcome: o}
}

func TestHistoryFailuresOutliveAFlood(t *testing.T) {
	h := NewHistory(HistoryConfig{Failures: 10, Successes: 100, Start: epoch})
	for id := range FlowID(5) {
		h.Put(flowAt(id, 1, Pending))
		h.Put(flowAt(id, 2, Refused))
	}
	for id := FlowID(5); id < 5000; id++ {
		h.Put(flowAt(id, 1, Pending))
		h.Put(flowAt(id, 2, Closed))
	}
	if got := h.Query(Filter{Outcomes: []Outcome{Refused}}, time.Time{}, 0); len(got) != 5 {
		t.Errorf("%d failures left of 5", len(got))
	}
	all, failures := h.Since()
	if want := epoch.Add(4899 * time.Second); !all.Equal(want) {
		t.Errorf("all since %v, want %v: the last one evicted", all, want)
	}
	if !failures.Equal(epoch) {
		t.Errorf("failures since %v, want the start %v", failures, epoch)
	}
	got := h.Query(Filter{}, epoch.Add(4990*time.Second), 3)
	if len(got) != 3 || got[0].ID != 4997 || got[2].ID != 4999 || got[2].Revision != 2 {
		t.Errorf("the last three of the last ten: %v", got)
	}
	if s := h.Stats(); s.Failures != 5 || s.Successes != 100 {
		t.Errorf("stats %+v", s)
	}
}

func TestHistoryRevisions(t *testing.T) {
	h := NewHistory(HistoryConfig{Start: epoch})
	h.Put(flowAt(1, 3, Closed))
	h.Put(flowAt(1, 2, Refused)) // late
	if f, ok := h.Get(1); !ok || f.Revision != 3 {
		t.Errorf("got %+v", f)
	}
	h.Put(flowAt(1, 4, Reset)) // from good to bad
	h.Put(flowAt(1, 5, Reset))
	if s := h.Stats(); s.Failures != 1 || s.Successes != 0 {
		t.Errorf("after a change of heart: %+v", s)
	}
	if got := h.Query(Filter{}, time.Time{}, 0); len(got) != 1 || got[0].Revision != 5 {
		t.Errorf("got %v", got)
	}
	if _, ok := h.Get(2); ok {
		t.Error("found what was never put")
	}
}

func TestHistoryFailureBounds(t *testing.T) {
	h := NewHistory(HistoryConfig{Failures: 10, FailuresMax: 20, FailureAge: 15 * time.Second, Start: epoch})
	for id := range FlowID(12) {
		h.Put(flowAt(id, 1, Refused))
	}
	if s := h.Stats(); s.Failures != 12 {
		t.Errorf("%d kept, want all 12: they are young", s.Failures)
	}
	h.Put(flowAt(1000, 1, Refused))
	if s := h.Stats(); s.Failures != 10 {
		t.Errorf("%d kept, want 10: the others are old", s.Failures)
	}
	for id := range FlowID(100) {
		f := flowAt(2000+id, 1, Refused)
		f.Start = epoch.Add(2000 * time.Second)
		h.Put(f)
	}
	s := h.Stats()
	if s.Failures != 20 {
		t.Errorf("%d kept, want 20 at most", s.Failures)
	}
	if want := epoch.Add(2000 * time.Second); !s.FailuresSince.Equal(want) {
		t.Errorf("since %v, want %v", s.FailuresSince, want)
	}
}

func BenchmarkHistoryPut(b *testing.B) {
	h := NewHistory(HistoryConfig{Start: epoch})
	b.ReportAllocs()
	var id FlowID
	f := make([]Flow, 1<<16)
	for b.Loop() {
		at := &f[id&(1<<16-1)]
		at.ID, at.Start, at.Outcome = id, epoch, Closed
		h.Put(at)
		id++
	}
}

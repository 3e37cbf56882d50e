package proxy

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// fakeBackend notes what it was asked to apply and fails on demand.
type fakeBackend struct {
	mu      sync.Mutex
	applied []*Snapshot
	fail    int
	partial bool
	panics  bool
	forgot  int
	full    bool
	took    time.Duration
	started func()
}

type fakeProgram struct{ snap *Snapshot }

func (fakeProgram) Index() Index        { return nil }
func (fakeProgram) Walk(Packet) Outcome { return Outcome{} }
func (fakeProgram) Text() string        { return "" }
func (fakeProgram) Problems() []Problem { return nil }

func (*fakeBackend) Mode() Mode                            { return IPTables }
func (*fakeBackend) Cleanup(context.Context) error         { return nil }
func (*fakeBackend) Render(s *Snapshot, _ Overlay) Program { return fakeProgram{s} }

func (b *fakeBackend) Apply(_ context.Context, p Program) (Report, error) {
	if b.started != nil {
		b.started()
	}
	time.Sleep(b.took)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.panics {
		b.panics = false
		panic("boom")
	}
	if b.fail > 0 {
		b.fail--
		return Report{Partial: b.partial}, errors.New("the kernel said no")
	}
	b.applied = append(b.applied, p.(fakeProgram).snap)
	full := b.full
	b.full = false
	return Report{Commits: 1, Full: full}, nil
}

func (b *fakeBackend) Forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.forgot, b.full = b.forgot+1, true
}

func (b *fakeBackend) got() []*Snapshot {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]*Snapshot(nil), b.applied...)
}

func run(t *testing.T, b *fakeBackend, f func(*Syncer)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := NewSyncer(SyncerConfig{Backend: b})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		f(s)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestSyncerCollapsesBursts(t *testing.T) {
	b := &fakeBackend{took: 10 * time.Millisecond}
	run(t, b, func(s *Syncer) {
		var last *Snapshot
		for range 50 {
			last = &Snapshot{}
			s.Set(last)
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Second)
		got := b.got()
		if len(got) < 2 || len(got) > 3 || got[len(got)-1] != last {
			t.Errorf("50 changes in 50 ms made %d syncs, last one right: %v", len(got), got[len(got)-1] == last)
		}
		if s.Stats().Pending {
			t.Error("still pending after the kernel took it")
		}
	})
}

func TestSyncerKeepsWhatFailed(t *testing.T) {
	b := &fakeBackend{fail: 3}
	run(t, b, func(s *Syncer) {
		want := &Snapshot{}
		s.Set(want)
		time.Sleep(100 * time.Millisecond)
		if st := s.Stats(); !st.Pending || st.LastError == nil || len(b.got()) != 0 {
			t.Errorf("after a failure: %+v", st)
		}
		time.Sleep(10 * time.Second)
		if got := b.got(); len(got) != 1 || got[0] != want {
			t.Errorf("not programmed after the failures ended: %v", got)
		}
		if st := s.Stats(); st.Pending || st.Failures != 3 || st.LastError != nil {
			t.Errorf("stats = %+v", st)
		}
	})
}

func TestSyncerSurvivesPanic(t *testing.T) {
	b := &fakeBackend{panics: true}
	run(t, b, func(s *Syncer) {
		s.Set(&Snapshot{})
		time.Sleep(5 * time.Second)
		if len(b.got()) != 1 || s.Stats().Failures != 1 {
			t.Errorf("stats = %+v, applied %d", s.Stats(), len(b.got()))
		}
	})
}

func TestSyncerResync(t *testing.T) {
	b := &fakeBackend{}
	run(t, b, func(s *Syncer) {
		s.Resync() // with nothing to program yet
		time.Sleep(time.Minute)
		if len(b.got()) != 0 {
			t.Error("programmed before the first Snapshot")
		}
		synced := s.Synced()
		s.Set(&Snapshot{})
		<-synced
		if s.View().Done.IsZero() {
			t.Error("not done when it is said to be")
		}
		time.Sleep(time.Minute)
		if len(b.got()) != 1 || b.forgot != 1 {
			t.Errorf("%d syncs, %d full", len(b.got()), b.forgot)
		}
		s.Resync()
		s.Resync()
		time.Sleep(time.Minute)
		if st := s.Stats(); len(b.got()) > 3 || b.forgot != 2 || st.Full != 2 || st.Pending {
			t.Errorf("%d syncs, %d full: %+v", len(b.got()), b.forgot, st)
		}
		time.Sleep(2*time.Hour + 2*time.Minute)
		if b.forgot != 4 {
			t.Errorf("%d full syncs two hours later, want 4", b.forgot)
		}
	})
}

// TestSyncerViews checks that a View is there before the kernel can follow it,
// and is told apart from one that the kernel has taken.
func TestSyncerViews(t *testing.T) {
	b := &fakeBackend{took: time.Second}
	run(t, b, func(s *Syncer) {
		first := &Snapshot{}
		b.started = func() {
			if v := s.View(); v == nil || v.Snapshot != first || !v.Done.IsZero() {
				t.Errorf("while programming the first: %+v", v)
			}
		}
		s.Set(first)
		time.Sleep(2 * time.Second)
		b.started = nil
		for range 2 * keepViews {
			s.Set(&Snapshot{})
			time.Sleep(2 * time.Second)
		}
		views := s.Views()
		if len(views) != keepViews {
			t.Fatalf("%d views kept", len(views))
		}
		for i, v := range views {
			if v.Done.Sub(v.From) != time.Second || i > 0 && !v.From.Before(views[i-1].From) {
				t.Errorf("view %d: from %v, done %v", i, v.From, v.Done)
			}
		}
	})
}

// TestSyncerPendingSince checks that what waits is as old as the oldest change
// that the kernel has not taken, however many came after it.
func TestSyncerPendingSince(t *testing.T) {
	b := &fakeBackend{took: time.Second, fail: 2}
	var seen []error
	synctest.Test(t, func(t *testing.T) {
		s := NewSyncer(SyncerConfig{Backend: b, Retry: 10 * time.Second, Observe: func(v *View, r Report) {
			if v.Done.IsZero() || r.Took != time.Second {
				t.Errorf("observed %+v, %+v", v, r)
			}
			seen = append(seen, v.Err)
		}})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		first := time.Now()
		s.Set(&Snapshot{})
		time.Sleep(5 * time.Second)
		s.SetOverlay(Overlay{})
		st := s.Stats()
		if !st.PendingSince.Equal(first) || st.Queued.Sub(first) != 5*time.Second || !st.LastSuccess.IsZero() {
			t.Errorf("with two changes waiting: %+v", st)
		}
		time.Sleep(30 * time.Second)
		st = s.Stats()
		if st.Pending || !st.PendingSince.IsZero() || st.LastSuccess.IsZero() {
			t.Errorf("with nothing waiting: %+v", st)
		}
		s.Set(&Snapshot{})
		time.Sleep(500 * time.Millisecond)
		during := time.Now()
		s.Set(&Snapshot{})
		time.Sleep(600 * time.Millisecond)
		if st = s.Stats(); !st.Pending || !st.PendingSince.Equal(during) {
			t.Errorf("with a change that came during the sync: %+v, want since %v", st, during)
		}
		time.Sleep(5 * time.Second)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	if len(seen) != 5 || seen[0] == nil || seen[1] == nil || seen[2] != nil {
		t.Errorf("observed %v", seen)
	}
}

// TestSyncerPartial: what the kernel refuses by itself is tried again and told,
// and does not make the rest look late; repairs that fail as a whole do.
func TestSyncerPartial(t *testing.T) {
	b := &fakeBackend{fail: 1000, partial: true}
	run(t, b, func(s *Syncer) {
		s.Set(&Snapshot{})
		time.Sleep(time.Hour)
		st := s.Stats()
		if !st.Pending || !st.PendingSince.IsZero() || st.LastError == nil || st.Failures < 100 {
			t.Errorf("with a part refused: %+v", st)
		}
		b.mu.Lock()
		b.partial = false
		b.mu.Unlock()
		time.Sleep(time.Hour)
		if st := s.Stats(); st.PendingSince.IsZero() || time.Since(st.PendingSince) < 59*time.Minute {
			t.Errorf("with all refused: %+v", st)
		}
	})
}

// TestKeepViews has two generations kept, of which one has been followed to its
// end whatever happens.
func TestKeepViews(t *testing.T) {
	s := NewSyncer(SyncerConfig{KeepViews: 2})
	for range 5 {
		older := s.Views()
		s.publish(&View{}, older)
		if n := len(s.Views()); n > 2 {
			t.Fatalf("%d views kept", n)
		}
		s.publish(&View{Done: time.Now()}, older)
		if v := s.Views(); v[len(v)-1].Done.IsZero() {
			t.Error("the older one is not done")
		}
	}
}

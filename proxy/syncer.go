package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// keepViews is how many generations of intent observers can look back on if
// SyncerConfig says nothing.
const keepViews = 8

// SyncerConfig says how often a Syncer works.
type SyncerConfig struct {
	Backend Backend
	// MinInterval is the least time from the end of one sync to the start of
	// the next, so that a burst of changes costs one: 100 ms if zero. The
	// first change after a rest is programmed at once.
	MinInterval time.Duration
	// Retry is the wait after a failed sync: 1 s if zero. It doubles up to
	// 30 s while syncs keep failing.
	Retry time.Duration
	// FullEvery is the longest time from one comparison of everything to the
	// next, by which also such changes of others are found that nobody saw: 1 h
	// if zero, never if negative. It needs a Backend that is a Forgetter.
	FullEvery time.Duration
	// KeepViews is how many generations of intent observers can look back on: 8
	// if zero. Two have always one that the kernel has followed to its end. With
	// 5,000 Services each takes some 4 MB.
	KeepViews int
	// Observe is called after each sync with its View, whose Done and Err are
	// set, and what was written. It must not wait. Nil means nobody looks.
	Observe func(*View, Report)
	Logger  *slog.Logger
}

// Syncer keeps the kernel at the newest Snapshot. What is wanted is kept until
// the kernel took it: a failed sync loses nothing and is tried again.
type Syncer struct {
	cfg   SyncerConfig
	wake  chan struct{}
	views atomic.Pointer[[]*View]

	mu      sync.Mutex
	want    *Snapshot
	overlay Overlay
	fresh   time.Time // the first change since the last sync began
	forget  bool      // the next sync is to compare everything
	stats   SyncStats
	ended   chan struct{} // closed at the end of the next sync
}

// SyncStats says what a Syncer has done.
type SyncStats struct {
	// Syncs counts all, Full those that compared everything, and Failures
	// those that could not program all.
	Syncs, Full, Failures uint64
	// Pending is set while a change has not reached the kernel.
	Pending bool
	// PendingSince is when the oldest such change was asked for, or since when
	// repairs fail, zero if all is well. What the kernel refuses by itself,
	// while it takes the rest, does not count: one bad Service is no reason
	// to take a node, and with it all others, out of service. Queued is when
	// the newest change was asked for, whether programmed or not.
	PendingSince, Queued time.Time
	// LastSuccess is the end of the last sync that programmed everything.
	LastSuccess time.Time
	// LastStart and LastEnd are of the last sync; LastError what it could not
	// program, nil if it could.
	LastStart, LastEnd time.Time
	LastError          error
	LastReport         Report
}

// NewSyncer makes a Syncer; Run starts it.
func NewSyncer(cfg SyncerConfig) *Syncer {
	if cfg.MinInterval == 0 {
		cfg.MinInterval = 100 * time.Millisecond
	}
	if cfg.Retry == 0 {
		cfg.Retry = time.Second
	}
	if cfg.KeepViews == 0 {
		cfg.KeepViews = keepViews
	}
	if cfg.FullEvery == 0 {
		cfg.FullEvery = time.Hour
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Syncer{cfg: cfg, wake: make(chan struct{}, 1), ended: make(chan struct{})}
	s.views.Store(&[]*View{})
	return s
}

// Set makes snap what is wanted. It returns at once.
func (s *Syncer) Set(snap *Snapshot) {
	s.mu.Lock()
	s.want = snap
	s.queued()
	s.mu.Unlock()
	s.kick()
}

// SetOverlay makes o what is out for a time. It returns at once.
func (s *Syncer) SetOverlay(o Overlay) {
	s.mu.Lock()
	s.overlay = o
	s.queued()
	s.mu.Unlock()
	s.kick()
}

// Resync makes the next sync compare everything and repair what differs, for a
// caller who has reason to think that others wrote to the kernel. It returns at
// once.
func (s *Syncer) Resync() {
	s.mu.Lock()
	s.forget = true
	s.mu.Unlock()
	s.kick()
}

// Synced returns a channel that is closed at the end of the next sync.
func (s *Syncer) Synced() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ended
}

// queued notes that something is asked for now. The caller holds mu.
func (s *Syncer) queued() {
	now := time.Now()
	s.stats.Pending, s.stats.Queued = true, now
	if s.fresh.IsZero() {
		s.fresh = now
	}
	if s.stats.PendingSince.IsZero() {
		s.stats.PendingSince = now
	}
}

func (s *Syncer) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Views returns the generations the kernel has followed, newest first. The
// first may still be on its way in: its Done is zero. The slice is immutable.
func (s *Syncer) Views() []*View { return *s.views.Load() }

// View returns the newest generation, nil before the first.
func (s *Syncer) View() *View {
	if v := s.Views(); len(v) > 0 {
		return v[0]
	}
	return nil
}

// Stats may be called at any time.
func (s *Syncer) Stats() SyncStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stats
}

// Run syncs until ctx ends, which is no error. A commit under way is finished
// first. Nothing is written before the first Set.
func (s *Syncer) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	timer.Stop()
	defer timer.Stop()
	full := time.NewTimer(s.cfg.FullEvery)
	defer full.Stop()
	if s.cfg.FullEvery < 0 {
		full.Stop()
	}
	var notBefore time.Time
	retry := s.cfg.Retry
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		case <-timer.C:
		case <-full.C:
			s.Resync()
		}
		if wait := time.Until(notBefore); wait > 0 {
			timer.Reset(wait)
			continue
		}
		s.mu.Lock()
		snap, overlay := s.want, s.overlay
		s.fresh = time.Time{}
		s.mu.Unlock()
		if snap == nil {
			continue
		}
		report, err := s.sync(ctx, snap, overlay)
		if report.Full && s.cfg.FullEvery > 0 {
			full.Reset(s.cfg.FullEvery)
		}
		notBefore = time.Now().Add(s.cfg.MinInterval)
		if err == nil {
			retry = s.cfg.Retry
			continue
		}
		if ctx.Err() != nil {
			return nil
		}
		s.cfg.Logger.Error("sync: not everything was programmed; trying again", "in", retry, "err", err)
		timer.Reset(retry)
		retry = min(2*retry, 30*time.Second)
	}
}

// sync does one sync and publishes its View: before the first commit, because
// packets follow new rules before the last one, and after it with the result.
func (s *Syncer) sync(ctx context.Context, snap *Snapshot, overlay Overlay) (report Report, err error) {
	start := time.Now()
	v := &View{Mode: s.cfg.Backend.Mode(), Snapshot: snap, Overlay: overlay, From: start}
	older := s.Views()
	err = caught("rendering", func() error {
		v.Program = s.cfg.Backend.Render(snap, overlay)
		return nil
	})
	done := *v
	if err == nil {
		s.publish(v, older)
		err = caught("programming", func() (err error) {
			report, err = s.apply(ctx, v.Program)
			return err
		})
		done.Done, done.Err = time.Now(), err
		s.publish(&done, older)
	} else {
		done.Done, done.Err = time.Now(), err
	}

	report.Took = done.Done.Sub(start)
	if s.cfg.Observe != nil && done.Program != nil {
		defer s.cfg.Observe(&done, report)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.ended)
	s.ended = make(chan struct{})
	st := &s.stats
	st.Syncs++
	if report.Full {
		st.Full++
	}
	st.LastStart, st.LastEnd, st.LastError, st.LastReport = start, done.Done, err, report
	switch {
	case err == nil:
		st.LastSuccess, st.PendingSince = done.Done, s.fresh
		st.Pending = !s.fresh.IsZero()
	case report.Partial:
		st.Failures++
		st.PendingSince = s.fresh
	default:
		st.Failures++
		if st.PendingSince.IsZero() {
			st.PendingSince = start
		}
	}
	s.cfg.Logger.Debug("sync: done", "took", st.LastReport.Took, "commits", report.Commits, "rules", report.Rules, "full", report.Full, "err", err)
	return report, err
}

// apply hands a Program to the backend, which forgets what it knows first if
// that was asked for.
func (s *Syncer) apply(ctx context.Context, p Program) (Report, error) {
	s.mu.Lock()
	forget := s.forget
	s.forget = false
	s.mu.Unlock()
	if f, ok := s.cfg.Backend.(Forgetter); ok && forget {
		f.Forget()
	}
	r, err := s.cfg.Backend.Apply(ctx, p)
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		return r, fmt.Errorf("proxy: stopped while programming: %w", err)
	}
	return r, err
}

// caught turns a panic of the backend into an error: a fault in programming one
// generation must not end the proxy.
func caught(doing string, f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("proxy: panic while %s: %v\n%s", doing, v, debug.Stack())
		}
	}()
	return f()
}

func (s *Syncer) publish(v *View, older []*View) {
	keep := s.cfg.KeepViews
	views := make([]*View, 0, keep)
	views = append(views, v)
	views = append(views, older[:min(len(older), keep-1)]...)
	s.views.Store(&views)
}

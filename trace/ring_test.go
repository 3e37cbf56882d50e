package trace

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"
)

func TestRingDelivers(t *testing.T) {
	ring := NewRing(8)
	ring.Publish(&Flow{ID: 99}) // before the reader: not for it
	r := ring.NewReader()
	for id := range FlowID(5) {
		ring.Publish(&Flow{ID: id})
	}
	flows, lost, err := r.Next(t.Context())
	if err != nil || lost != 0 || len(flows) != 5 {
		t.Fatalf("got %d flows, lost %d, %v; want 5, 0, nil", len(flows), lost, err)
	}
	for i, f := range flows {
		if f.ID != FlowID(i) {
			t.Errorf("flow %d has ID %d", i, f.ID)
		}
	}
}

func TestRingOverrunIsExact(t *testing.T) {
	ring := NewRing(8)
	r := ring.NewReader()
	for id := range FlowID(21) {
		ring.Publish(&Flow{ID: id})
	}
	flows, lost, err := r.Next(t.Context())
	if err != nil || lost != 13 || len(flows) != 8 {
		t.Fatalf("got %d flows, lost %d, %v; want 8, 13, nil", len(flows), lost, err)
	}
	if flows[0].ID != 13 || flows[7].ID != 20 {
		t.Errorf("got %d to %d, want 13 to 20", flows[0].ID, flows[7].ID)
	}
}

// TestRingBlockedReader holds a writer beside a reader that never reads: it
// must finish, and a reader that does read must get everything or a count.
func TestRingBlockedReader(t *testing.T) {
	ring := NewRing(64)
	blocked := ring.NewReader()
	const n = 200_000
	start := time.Now()
	for id := range FlowID(n) {
		ring.Publish(&Flow{ID: id})
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("%d publications beside a blocked reader took %v", n, took)
	}
	flows, lost := blocked.Poll()
	if lost+uint64(len(flows)) != n {
		t.Errorf("lost %d + read %d, want %d in all", lost, len(flows), n)
	}
}

func TestRingManyWritersManyReaders(t *testing.T) {
	const writers, each = 4, 20_000
	ring := NewRing(256)
	var readers, write sync.WaitGroup
	for range 3 {
		r := ring.NewReader()
		readers.Go(func() {
			var total uint64
			var last [writers]FlowID
			for {
				flows, lost, err := r.Next(t.Context())
				total += lost + uint64(len(flows))
				for _, f := range flows {
					w := f.CTID
					if f.ID <= last[w] {
						t.Errorf("writer %d: %d after %d", w, f.ID, last[w])
					}
					last[w] = f.ID
				}
				if errors.Is(err, ErrClosed) {
					break
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
			if total != writers*each {
				t.Errorf("read and lost %d in all, want %d", total, writers*each)
			}
		})
	}
	for w := range writers {
		write.Go(func() {
			for i := range each {
				ring.Publish(&Flow{ID: FlowID(i + 1), CTID: uint32(w)})
			}
		})
	}
	write.Wait()
	ring.Close()
	readers.Wait()
}

func TestRingLossIsSummed(t *testing.T) {
	ring := NewRing(4)
	r := ring.NewReader()
	for range 1000 {
		ring.PublishLoss(Loss{Source: NFLog, From: 5, To: 9, Events: 2, Where: "kernel"})
	}
	ring.PublishLoss(Loss{Source: Conntrack, From: 1, To: 2, Events: 1, Where: "queue"})
	flows, lost, err := r.Next(t.Context())
	if len(flows) != 0 || lost != 0 || err != nil {
		t.Fatalf("got %v, %d, %v, want a wake-up for the loss only", flows, lost, err)
	}
	got := r.Losses()
	if len(got) != 2 || got[0].Events != 2000 || got[1].Events != 1 {
		t.Errorf("losses %+v", got)
	}
	if again := r.Losses(); again != nil {
		t.Errorf("told twice: %+v", again)
	}
}

func TestReaderWakesAndEnds(t *testing.T) {
	ring := NewRing(4)
	r := ring.NewReader()
	go func() {
		time.Sleep(10 * time.Millisecond)
		ring.Publish(&Flow{ID: 7})
	}()
	flows, _, err := r.Next(t.Context())
	if err != nil || len(flows) != 1 || flows[0].ID != 7 {
		t.Fatalf("got %v, %v", flows, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := r.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	r.Close()
	if _, _, err := r.Next(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if n := ring.Stats().Readers; n != 0 {
		t.Errorf("%d readers left", n)
	}
}

func BenchmarkPublish(b *testing.B) {
	ring := NewRing(8192)
	ring.NewReader() // never reads
	f := &Flow{}
	b.ReportAllocs()
	for b.Loop() {
		ring.Publish(f)
	}
}

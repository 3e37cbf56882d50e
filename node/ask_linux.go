package node

import (
	"context"
	"errors"
	"io/fs"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/source/ctevent"
)

// How many entries may be asked for in a second: freely while somebody
// follows, and sparingly, for timeouts and repairs, while nobody does.
const (
	asksWatched   = 5000
	asksUnwatched = 200
)

// ask queues a question about one conntrack entry. It is called by the
// correlator only, and never waits.
func (t *tracer) ask(tuple conntrack.Tuple) bool {
	if !t.allow(time.Now()) {
		return false
	}
	select {
	case t.asks <- tuple:
		return true
	default:
		return false
	}
}

// allow is a token bucket that holds one second's worth.
func (t *tracer) allow(now time.Time) bool {
	rate := float64(asksUnwatched)
	if t.watchers.Load() > 0 {
		rate = asksWatched
	}
	t.tokens = min(rate, t.tokens+rate*now.Sub(t.refilled).Seconds())
	t.refilled = now
	if t.tokens < 1 {
		return false
	}
	t.tokens--
	return true
}

// askKernel reads the whole table once and then answers questions.
func (t *tracer) askKernel(ctx context.Context) error {
	conn, err := conntrack.Open(conntrack.Config{})
	if err != nil {
		return err
	}
	defer conn.Close()
	b := new(batch)
	send := func() error {
		if len(b.events) == 0 {
			return nil
		}
		select {
		case t.queue <- b:
			b = t.pool.Get().(*batch)
			b.events = b.events[:0]
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	err = conn.Dump(ctx, func(f conntrack.Flow) error {
		b.events = append(b.events, ctevent.Entry(f, time.Now()))
		if len(b.events) < 256 {
			return nil
		}
		return send()
	})
	if err != nil && ctx.Err() == nil {
		t.logger.Warn("connections older than kptrace stay unseen", "err", err)
	}
	for {
		if err := send(); err != nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case tuple := <-t.asks:
			b.events = append(b.events, t.answer(conn, tuple))
		}
		for more := true; more && len(b.events) < 64; {
			select {
			case tuple := <-t.asks:
				b.events = append(b.events, t.answer(conn, tuple))
			default:
				more = false
			}
		}
	}
}

// answer asks the kernel for one entry. A kernel that cannot say is taken as
// one that has none: the flow then ends without its bytes.
func (t *tracer) answer(conn *conntrack.Conn, tuple conntrack.Tuple) trace.Event {
	f, err := conn.Get(tuple)
	if err == nil {
		return ctevent.Entry(f, time.Now())
	}
	if !errors.Is(err, fs.ErrNotExist) {
		t.logger.Debug("asking for a conntrack entry", "tuple", tuple, "err", err)
	}
	return ctevent.Gone(tuple, 0, time.Now())
}

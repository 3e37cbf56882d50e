package otlp

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"time"

	"github.com/kptrace/kptrace/trace"
)

const (
	retryFirst = 500 * time.Millisecond
	retryMost  = 10 * time.Second
)

// pipe is a bounded queue of connections and the one goroutine that sends them.
// What waits are Flows, which History has too; spans are made of them when
// they are sent.
type pipe struct {
	signal       Signal
	what         string
	giveUp, ends time.Duration
	logger       *slog.Logger
	queue        chan *trace.Flow
	counters
	// send makes one request and returns how many items it had.
	send func(context.Context, []*trace.Flow) (int, error)
}

func newPipe(what string, s Signal, c *Config) *pipe {
	return &pipe{signal: s, what: what, giveUp: c.GiveUp, ends: c.Flush, logger: c.Logger, queue: make(chan *trace.Flow, s.Queue)}
}

// put queues a Flow or drops it. It never waits.
func (p *pipe) put(f *trace.Flow) {
	select {
	case p.queue <- f:
	default:
		p.dropped.Add(1)
	}
}

// run sends what is queued until ctx ends, and then what is left in the queue,
// for as long as Config.Flush allows. The queue is closed by then.
func (p *pipe) run(ctx context.Context) {
	// Requests outlive ctx by the time to flush.
	sending, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(p.ends, cancel) })
	defer stop()
	batch := make([]*trace.Flow, 0, p.signal.Batch)
	for open := true; open; {
		batch, open = p.gather(ctx, batch[:0])
		if len(batch) > 0 {
			p.deliver(ctx, sending, batch)
		}
		clear(batch)
	}
}

// gather waits for Flows and takes as many as make a batch, or as come within
// the delay. It reports false when the queue is closed and empty.
func (p *pipe) gather(ctx context.Context, batch []*trace.Flow) ([]*trace.Flow, bool) {
	f, ok := <-p.queue
	if !ok {
		return batch, false
	}
	batch = append(batch, f)
	p.inFlight.Add(1)
	timer := time.NewTimer(p.signal.Delay)
	defer timer.Stop()
	late, ended := timer.C, ctx.Done()
	for len(batch) < cap(batch) {
		select {
		case f, ok := <-p.queue:
			if !ok {
				return batch, false
			}
			batch = append(batch, f)
			p.inFlight.Add(1)
		case <-late:
			return batch, true
		case <-ended: // no more waiting: the queue is about to be closed
			ended, late = nil, nil
		}
	}
	return batch, true
}

// deliver sends one batch, trying again until it is taken, refused for good,
// too old, or sending ends. Once ctx has ended it does not wait between tries
// any longer than it must.
func (p *pipe) deliver(ctx, sending context.Context, batch []*trace.Flow) {
	n := uint64(len(batch))
	defer p.inFlight.Add(-n)
	began, wait := time.Now(), retryFirst
	for {
		items, err := p.try(sending, batch)
		rejected, err := partial(err)
		p.rejected.Add(rejected)
		if err == nil {
			p.requests.Add(1)
			p.items.Add(uint64(items))
			p.sent.Add(n)
			if since := p.success(); !since.IsZero() {
				p.logger.Info("the collector takes "+p.what+" again", "after", time.Since(since).Round(time.Millisecond))
			}
			return
		}
		now := time.Now()
		if p.failure(err, now) {
			p.logger.Warn("cannot send "+p.what+"; tracing itself and Services are not affected", "err", err)
		}
		if permanent(err) || now.Sub(began) > p.giveUp || sending.Err() != nil {
			p.failed.Add(n)
			return
		}
		p.retries.Add(1)
		timer := time.NewTimer(wait/2 + rand.N(wait))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Reset(min(wait, retryFirst))
			select {
			case <-timer.C:
			case <-sending.Done():
			}
		}
		timer.Stop()
		wait = min(2*wait, retryMost)
	}
}

// try makes one request. A fault in making it costs the batch and nothing more.
func (p *pipe) try(ctx context.Context, batch []*trace.Flow) (items int, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	return p.send(ctx, batch)
}

// stats counts what is in the queue last, so that a Flow on its way is missed
// rather than counted twice.
func (p *pipe) stats(endpoint string) *SignalStats {
	s := &SignalStats{
		Endpoint: endpoint, Protocol: p.signal.Protocol,
		Sent: p.sent.Load(), Failed: p.failed.Load(), InFlight: p.inFlight.Load(),
		Queued: uint64(len(p.queue)), Capacity: uint64(cap(p.queue)),
		Dropped: p.dropped.Load(), Unsampled: p.unsampled.Load(), Seen: p.seen.Load(),
		Items: p.items.Load(), Rejected: p.rejected.Load(), Requests: p.requests.Load(), Retries: p.retries.Load(),
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s.LastError, s.LastErrorAt, s.Failing = p.err, p.errAt, p.broken
	return s
}

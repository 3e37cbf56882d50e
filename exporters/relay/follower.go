package relay

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/kptrace/kptrace/trace"
)

const (
	// idleAfter is how long nothing may be sent before the facts are.
	idleAfter = 3 * time.Second
	// idleAgain is how long until they are sent again.
	idleAgain = 30 * time.Second
	// lossEvery is how often losses are reported at most.
	lossEvery = time.Second
	// overlap is how long a Flow taken from History may still come through
	// the Ring.
	overlap = 2 * time.Second
	// pathsLate is how long after a packet its path comes, and pathsLatest how much
	// longer one is waited for that is known to be under way.
	pathsLate   = 800 * time.Millisecond
	pathsLatest = 4 * time.Second
	// gather is how long a follower that allows it waits for more to send.
	gather = 10 * time.Millisecond
)

// follower is one Follow call. It belongs to one goroutine. It is bounded by
// its place in the Ring: while the other end does not read, run does not
// either, and what is overrun is counted.
type follower struct {
	s       *Server
	req     trace.Request
	settled trace.Filter
	picky   bool // the filter can change its mind about a flow
	out     *sender
	// notes go into the header.
	notes []string

	// held are flows that have not ended, to be sent at the next flush.
	held map[trace.FlowID]*trace.Flow
	// matched are flows not ended that a picky filter has selected.
	matched map[trace.FlowID]bool
	// known are the revisions sent from History, until they can no longer
	// come through the Ring.
	known map[trace.FlowID]uint32

	// straight is how many connections past Services there had been before.
	straight map[trace.Target]trace.Direct

	others        uint64
	losses, total []trace.Loss
	started       time.Time
	lastSent      time.Time
	lastIdle      time.Time
	lastLoss      time.Time
	lastFlush     time.Time
}

func newFollower(s *Server, req trace.Request, send func(*Batch) error) *follower {
	f := &follower{
		s: s, req: req, settled: req.Filter.Settled(),
		picky: len(req.Filter.Outcomes) > 0 || req.Filter.MinDuration > 0,
		held:  make(map[trace.FlowID]*trace.Flow), matched: make(map[trace.FlowID]bool),
		started: time.Now(),
	}
	f.out = newSender(s.node(), send)
	return f
}

// run sends the header, what History holds, and then what comes, until ctx
// ends. If its cause is errFinish, the rest and an End are sent too.
func (f *follower) run(ctx context.Context) error {
	reader := f.s.cfg.Ring.NewReader()
	defer reader.Close()
	if f.req.Direct {
		reader.WithDirect()
	}
	f.straight = f.s.cfg.Direct()
	f.s.cfg.Findings(nil) // they are to be there when nothing comes
	header, err := f.s.header(&f.req)
	if err != nil {
		return err
	}
	header.Notes = append(header.Notes, f.notes...)
	if err := f.out.add(trace.Message{Header: header}); err != nil {
		return err
	}
	if err := f.history(); err != nil {
		return err
	}
	if err := f.out.flush(); err != nil {
		return err
	}
	now := time.Now()
	f.lastSent, f.lastFlush, f.lastLoss = now, now, now
	for {
		tick, cancel := context.WithDeadline(ctx, time.Now().Add(f.tick()))
		flows, lost, err := reader.Next(tick)
		cancel()
		switch {
		case errors.Is(err, trace.ErrClosed), err != nil && errors.Is(context.Cause(ctx), errFinish):
			return f.end(reader)
		case err != nil && ctx.Err() != nil:
			return ctx.Err()
		}
		if err := f.take(flows, lost, reader.Losses()); err != nil {
			return err
		}
		if err := f.due(time.Now()); err != nil {
			return err
		}
		if f.req.Interval > 0 && len(flows) > 0 {
			time.Sleep(gather)
		}
	}
}

// tick is how long run may sleep.
func (f *follower) tick() time.Duration {
	if f.req.Interval > 0 {
		return min(f.req.Interval, time.Second/2)
	}
	return time.Second / 2
}

// history sends what the request wants of the past.
func (f *follower) history() error {
	if f.req.Since.IsZero() && f.req.Last == 0 {
		return nil
	}
	f.known = make(map[trace.FlowID]uint32)
	for _, flow := range f.s.cfg.History.Query(f.req.Filter, f.req.Since, f.req.Last) {
		f.known[flow.ID] = flow.Revision
		if f.picky && !flow.Ended {
			f.matched[flow.ID] = true
		}
		if err := f.out.add(trace.Message{Flow: flow}); err != nil {
			return err
		}
	}
	return nil
}

// take sorts what came through the Ring.
func (f *follower) take(flows []*trace.Flow, lost uint64, losses []trace.Loss) error {
	now := time.Now()
	for _, l := range losses {
		f.losses = trace.MergeLoss(f.losses, l)
	}
	if lost > 0 {
		f.losses = trace.MergeLoss(f.losses, trace.Loss{
			From: f.lastFlush.UnixNano(), To: now.UnixNano(), Events: lost, Where: "ring",
		})
	}
	for _, flow := range flows {
		if err := f.one(flow); err != nil {
			return err
		}
	}
	return nil
}

func (f *follower) one(flow *trace.Flow) error {
	if flow.Direct() {
		flow = f.named(flow)
	}
	if rev, ok := f.known[flow.ID]; ok && flow.Revision <= rev {
		return nil
	}
	if !f.settled.Match(flow) {
		f.others++
		return nil
	}
	if f.picky {
		was := f.matched[flow.ID]
		is := f.req.Filter.Match(flow)
		switch {
		case is && !flow.Ended:
			f.matched[flow.ID] = true
		case was:
			delete(f.matched, flow.ID)
		}
		if !is {
			delete(f.held, flow.ID)
			if !was {
				f.others++
				return nil
			}
			return f.out.add(trace.Message{Flow: flow, Gone: true})
		}
	}
	if f.req.Interval > 0 && !flow.Ended {
		f.held[flow.ID] = flow
		return nil
	}
	delete(f.held, flow.ID)
	return f.out.add(trace.Message{Flow: flow})
}

// due sends what the time has come for.
func (f *follower) due(now time.Time) error {
	if now.Sub(f.lastFlush) >= f.req.Interval {
		f.lastFlush = now
		if err := f.release(); err != nil {
			return err
		}
	}
	if len(f.losses) > 0 && now.Sub(f.lastLoss) >= lossEvery {
		f.lastLoss = now
		if err := f.sendLosses(); err != nil {
			return err
		}
	}
	if len(f.out.next.Messages) > 0 {
		f.lastSent = now
	} else if now.Sub(f.lastSent) >= idleAfter && now.Sub(f.lastIdle) >= idleAgain {
		f.lastIdle = now
		if err := f.out.add(trace.Message{Idle: f.s.idle(f, now)}); err != nil {
			return err
		}
	}
	if f.known != nil && now.Sub(f.started) > overlap {
		f.known = nil
	}
	return f.out.flush()
}

// release sends the flows that were held back.
func (f *follower) release() error {
	if len(f.held) == 0 {
		return nil
	}
	flows := make([]*trace.Flow, 0, len(f.held))
	for _, flow := range f.held {
		flows = append(flows, flow)
	}
	clear(f.held)
	slices.SortFunc(flows, trace.CompareFlows)
	for _, flow := range flows {
		if err := f.out.add(trace.Message{Flow: flow}); err != nil {
			return err
		}
	}
	return nil
}

func (f *follower) sendLosses() error {
	for _, l := range f.losses {
		f.total = trace.MergeLoss(f.total, l)
		if err := f.out.add(trace.Message{Loss: &l}); err != nil {
			return err
		}
	}
	f.losses = nil
	return nil
}

// end sends what is left in the Ring, what was held back, and an End.
func (f *follower) end(reader *trace.Reader) error {
	if f.req.Path.Wanted() {
		since := time.Now() // the last connections' are still being joined
		time.Sleep(pathsLate)
		settling, cancel := context.WithTimeout(context.Background(), pathsLatest)
		f.s.cfg.Settle(settling, since)
		cancel()
	}
	// What is published from now on is not part of the answer, or a busy node
	// would never end.
	for range 1 + f.s.cfg.Ring.Stats().Size/1024 {
		flows, lost := reader.Poll()
		if len(flows) == 0 && lost == 0 {
			break
		}
		if err := f.take(flows, lost, nil); err != nil {
			return err
		}
	}
	if err := f.take(nil, 0, reader.Losses()); err != nil {
		return err
	}
	if err := f.release(); err != nil {
		return err
	}
	if err := f.sendLosses(); err != nil {
		return err
	}
	if err := f.out.add(trace.Message{End: &trace.End{Losses: f.total, Direct: f.direct()}}); err != nil {
		return err
	}
	return f.out.flush()
}

package load

import (
	"cmp"
	"context"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/trace"
)

// TestRate makes 2,000 connections a second for ten seconds through a
// ClusterIP while somebody follows: each must be shown exactly once, with the
// endpoint that answered, and nothing may be lost anywhere.
func TestRate(t *testing.T) {
	const rate, conns = 2000, 20_000
	p := newWorld(t, 1).place(0)
	p.proxy()
	before := p.status()
	f := p.follow()
	began := time.Now()
	var made []Conn
	r, err := p.run(t.Context(), Config{Conns: conns, Rate: rate, Concurrency: 256, Each: func(c Conn) { made = append(made, c) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(r.String())
	// A machine that is busy with other tests may be slower for a while; what
	// it did must be shown all the same.
	if r.Done != conns || r.PerSecond < 0.75*rate {
		t.Errorf("this machine's client made %d of %d connections at %.0f/s, not %d/s: %v", r.Done, conns, r.PerSecond, rate, r.Errors)
	}
	flows := f.await(len(made))
	maps.DeleteFunc(flows, func(_ trace.FlowID, f *trace.Flow) bool { return f.Start.Before(began) })
	checkShown(t, made, flows)
	after := p.status()
	for _, l := range after.Losses {
		t.Errorf("lost: %d events of %s at %s", l.Events, l.Source, l.Where)
	}
	for _, s := range after.Sources {
		if s.Lost != 0 || s.Overruns != 0 || s.Damaged != 0 {
			t.Errorf("%s lost %d, overran %d times, could not read %d; its receive buffer has %d bytes",
				s.Source, s.Lost, s.Overruns, s.Damaged, s.ReceiveBuffer)
		}
	}
	if n := after.Table.Evicted - before.Table.Evicted; n != 0 {
		t.Errorf("%d flows were evicted", n)
	}
	for _, l := range f.losses {
		t.Errorf("the follower lost %d of %s at %s", l.Events, l.Source, l.Where)
	}
}

// checkShown compares what the client did with what was shown. A client's port
// recurs, so what happened at one port is compared in the order of time.
func checkShown(t *testing.T, made []Conn, flows map[trace.FlowID]*trace.Flow) {
	t.Helper()
	byPort := map[netip.AddrPort][]*trace.Flow{}
	for _, f := range flows {
		byPort[f.Client.Addr] = append(byPort[f.Client.Addr], f)
	}
	for _, list := range byPort {
		slices.SortFunc(list, trace.CompareFlows)
	}
	slices.SortFunc(made, func(a, b Conn) int { return a.Began.Compare(b.Began) })
	var missing, wrong, outcome, incomplete, noTime, told int
	tell := func(what string, c *Conn, f *trace.Flow) {
		if told++; told <= 10 {
			t.Logf("%s: made %+v, shown %+v", what, c, f)
		}
	}
	for _, c := range made {
		list := byPort[c.Local]
		if len(list) == 0 {
			missing++
			tell("missing", &c, nil)
			continue
		}
		f := list[0]
		byPort[c.Local] = list[1:]
		if f.Backend.Addr != c.Server || !f.Decision.Known || f.Decision.Candidates != endpointsPerNode {
			wrong++
			tell("wrong", &c, f)
		}
		if f.Outcome != trace.Closed || !f.Ended {
			outcome++
			tell("not closed", &c, f)
		}
		if f.Established < 0 || f.Duration < f.Established {
			noTime++
		}
		if f.Incomplete {
			incomplete++
		}
	}
	twice := 0
	for _, list := range byPort {
		twice += len(list)
		for _, f := range list {
			tell("again", nil, f)
		}
	}
	if missing+twice+wrong+outcome+incomplete+noTime > 0 {
		t.Errorf("of %d connections %d were not shown, %d shown again, %d with a wrong endpoint or decision, %d without the outcome closed, %d without times, %d incomplete",
			len(made), missing, twice, wrong, outcome, noTime, incomplete)
	}
}

// follower keeps the newest update of each flow.
type follower struct {
	t      *testing.T
	mu     sync.Mutex // guards flows and losses
	flows  map[trace.FlowID]*trace.Flow
	losses []trace.Loss
}

// follow follows everything on the node until the test ends.
func (p *place) follow() *follower {
	t := p.w.t.(*testing.T)
	t.Helper()
	f := &follower{t: t, flows: map[trace.FlowID]*trace.Flow{}}
	c, err := relay.Dial(p.socket())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	header, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- c.Follow(ctx, trace.Request{}, func(m trace.Message) error {
			f.mu.Lock()
			defer f.mu.Unlock()
			switch {
			case m.Header != nil:
				close(header)
			case m.Flow != nil:
				if old := f.flows[m.Flow.ID]; old != nil && old.Revision >= m.Flow.Revision {
					t.Errorf("revision %d of %v came after %d", m.Flow.Revision, m.Flow.ID, old.Revision)
				}
				f.flows[m.Flow.ID] = m.Flow
			case m.Loss != nil:
				f.losses = append(f.losses, *m.Loss)
			}
			return nil
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("following: %v", err)
		}
		c.Close()
	})
	select {
	case <-header:
	case err := <-ended:
		t.Fatal(cmp.Or(err, context.Canceled))
	}
	return f
}

// await waits until so many flows have ended, or no more come, and returns
// all there are.
func (f *follower) await(want int) map[trace.FlowID]*trace.Flow {
	f.t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		f.mu.Lock()
		ended := 0
		for _, flow := range f.flows {
			if flow.Ended {
				ended++
			}
		}
		if ended >= want || time.Now().After(deadline) {
			defer f.mu.Unlock()
			return maps.Clone(f.flows)
		}
		f.mu.Unlock()
		time.Sleep(100 * time.Millisecond)
	}
}

package node

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/exporters/prom"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

const (
	// rerouteGather is how long stuck connections gather, so that they share
	// a commit.
	rerouteGather = 20 * time.Millisecond
	rerouteReap   = time.Second
	// maxStuck bounds those that wait to be looked at.
	maxStuck = 256
)

// unanswered is a connection that the tracer says nobody answers.
type unanswered struct {
	stuck proxy.Stuck
	// since is when the last endpoint was picked.
	since time.Time
}

// tellStuck passes on a flow that is stuck. It never waits: what finds no room
// stays where it is, and its client's next SYN brings it here again.
func (t *tracer) tellStuck(f *trace.Flow) {
	if t.stuck == nil || f.Outcome != trace.Unanswered || f.Ended || f.Tuple.Proto() != conntrack.TCP || len(f.Attempts) == 0 {
		return
	}
	u := unanswered{stuck: proxy.Stuck{Tuple: f.Tuple}, since: f.Attempts[len(f.Attempts)-1].Start}
	for i := range f.Attempts {
		u.stuck.Tried = append(u.stuck.Tried, f.Attempts[i].Endpoint.Addr)
	}
	select {
	case t.stuck <- u:
	default:
	}
}

// rerouter is the Backend where it is to send stuck connections elsewhere.
func (c *Config) rerouter() (proxy.Rerouter, bool) {
	if c.Reroute <= 0 || !c.Trace {
		return nil, false
	}
	r, ok := c.Backend.(proxy.Rerouter)
	return r, ok
}

// unansweredAfter is when the correlator calls a connection unanswered: after a
// second, unless it is to be moved before.
func (c *Config) unansweredAfter() time.Duration {
	if _, ok := c.rerouter(); ok {
		return min(time.Second, c.Reroute)
	}
	return 0
}

// reroute has stuck connections sent elsewhere, until ctx ends.
func (n *node) reroute(ctx context.Context) {
	r, ok := n.cfg.rerouter()
	if !ok {
		return
	}
	gather := time.NewTicker(rerouteGather)
	defer gather.Stop()
	reaped := time.Now()
	var waiting []unanswered
	for {
		select {
		case <-ctx.Done():
			return
		case u := <-n.tracer.stuck:
			waiting = append(waiting, u)
			continue
		case <-gather.C:
		}
		now := time.Now()
		if now.Sub(reaped) >= rerouteReap {
			reaped = now
			if err := r.ReapReroutes(ctx, now); err != nil && ctx.Err() == nil {
				n.cfg.Logger.Warn("rules of rerouted connections stay for now", "err", err)
			}
		}
		var due []proxy.Stuck
		waiting = slices.DeleteFunc(waiting, func(u unanswered) bool {
			if now.Sub(u.since) < n.cfg.Reroute {
				return false
			}
			due = append(due, u.stuck)
			return true
		})
		if len(due) == 0 {
			continue
		}
		if moved, err := r.Reroute(ctx, due); err != nil && ctx.Err() == nil {
			n.cfg.Logger.Warn("connections that nobody answers stay where they are", "moved", moved, "of", len(due), "err", err)
		} else if moved > 0 {
			n.cfg.Logger.Info("sent connections that nobody answered elsewhere", "moved", moved, "endpoints", lastTried(due))
		}
	}
}

func lastTried(due []proxy.Stuck) []netip.AddrPort {
	var out []netip.AddrPort
	for _, s := range due {
		if ep := s.Tried[len(s.Tried)-1]; !slices.Contains(out, ep) {
			out = append(out, ep)
		}
	}
	return out
}

// rerouteCounters are the metrics of rerouting.
func rerouteCounters(s proxy.RerouteStats) []prom.Counter {
	const about = "Connections that nobody answered by what was done about them: moved to another endpoint, answered or gone before that, alone without another endpoint, limited because there were too many, failed by an error, raced because the answer came in the moment they were moved."
	out := []prom.Counter{{
		Name: "kptrace_reroute_rules", Help: "Connections with rules that lead them to another endpoint, at the moment.",
		Value: float64(s.Rules), Gauge: true,
	}}
	for _, r := range []struct {
		result string
		n      uint64
	}{
		{"moved", s.Moved}, {"answered", s.Answered}, {"gone", s.Gone}, {"alone", s.Alone},
		{"limited", s.Limited}, {"failed", s.Failed}, {"raced", s.Raced},
	} {
		out = append(out, prom.Counter{Name: "kptrace_reroute_decisions_total", Help: about, Labels: []string{"result", r.result}, Value: float64(r.n)})
	}
	return out
}

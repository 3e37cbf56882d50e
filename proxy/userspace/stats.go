package userspace

import (
	"sync/atomic"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

// stats counts; see proxy.RelayStats.
type stats struct {
	open, sessions                                  atomic.Int64
	accepted, sessionsMade, datagrams               atomic.Uint64
	connected, refused, unreachable, timeout, other atomic.Uint64
	retried, unserved, resets, evicted              atomic.Uint64
	out, in                                         atomic.Uint64
	dropped, direct, waits, exhausted               atomic.Uint64
}

func (s *stats) failed(f proxy.RelayFailure) {
	switch f {
	case proxy.FailedRefused:
		s.refused.Add(1)
	case proxy.FailedUnreachable:
		s.unreachable.Add(1)
	case proxy.FailedTimeout:
		s.timeout.Add(1)
	default:
		s.other.Add(1)
	}
}

// RelayStats may be called at any time.
func (b *Backend) RelayStats() proxy.RelayStats {
	s := &b.stats
	out := proxy.RelayStats{
		Open: int(s.open.Load()), Sessions: int(s.sessions.Load()),
		Accepted: s.accepted.Load(), SessionsMade: s.sessionsMade.Load(), Datagrams: s.datagrams.Load(),
		Connected: s.connected.Load(), Refused: s.refused.Load(), Unreachable: s.unreachable.Load(),
		TimedOut: s.timeout.Load(), Failed: s.other.Load(),
		Retried: s.retried.Load(), Unserved: s.unserved.Load(), AffinityResets: s.resets.Load(), AffinityEvicted: s.evicted.Load(),
		Out: s.out.Load(), In: s.in.Load(),
		Dropped: s.dropped.Load(), Direct: s.direct.Load(), Waits: s.waits.Load(), Exhausted: s.exhausted.Load(),
		Descriptors: int(b.inUse.Load()), MaxDescriptors: b.cfg.MaxDescriptors,
		PortRange: b.cfg.Ports.String(), PortsFree: b.ports.free(),
	}
	now := time.Now()
	b.eachListener(func(l *listener) {
		out.Listeners++
		out.AffinityClients += l.balance.tidy(now)
	})
	return out
}

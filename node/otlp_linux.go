package node

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kptrace/kptrace/exporters/otlp"
	"github.com/kptrace/kptrace/exporters/prom"
	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/trace"
)

// spans exports connections to OpenTelemetry. The zero value exports nothing.
type spans struct{ now atomic.Pointer[otlp.Exporter] }

// keep reports whether the trace of a Flow is exported.
func (s *spans) keep(f *trace.Flow) bool {
	e := s.now.Load()
	return e != nil && e.Keep(f)
}

// wants reports whether a Flow that is about to end will be exported.
func (s *spans) wants(f *trace.Flow) bool {
	e := s.now.Load()
	return e != nil && e.Wants(f)
}

// openSpans makes the exporter that the Config asks for.
func (n *node) openSpans(ctx context.Context) error {
	if n.cfg.OTLP == nil || n.tracer == nil {
		return nil
	}
	cfg := *n.cfg.OTLP
	cfg.Node, cfg.Version, cfg.Logger = n.cfg.Name, n.cfg.Version, n.cfg.Logger
	n.cfg.OTLP = &cfg
	e, err := otlp.New(ctx, cfg)
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	n.spans.now.Store(e)
	return nil
}

// exportSpans exports until ctx ends. A fault there costs what was being
// exported, and nobody else.
func (n *node) exportSpans(ctx context.Context, g *errgroup.Group) {
	if n.spans.now.Load() == nil {
		return
	}
	reader := n.tracer.ring.NewReader()
	g.Go(func() error {
		defer reader.Close()
		for {
			err := guard(func() error { return n.spans.now.Load().Run(ctx, reader) })()
			if err == nil || ctx.Err() != nil {
				if err != nil {
					n.cfg.Logger.Error("not all was exported", "err", err)
				}
				return nil
			}
			n.cfg.Logger.Error("connections are not exported; trying again", "in", upkeepAgain, "err", err)
			pause(ctx, upkeepAgain)
			e, err := otlp.New(ctx, *n.cfg.OTLP)
			if err != nil {
				n.cfg.Logger.Error("connections are not exported", "err", err)
				return nil
			}
			n.spans.now.Store(e)
		}
	})
}

// exports is the exporter's account for status.
func (n *node) exports() []relay.Export {
	e := n.spans.now.Load()
	if e == nil {
		return nil
	}
	s := e.Stats()
	var list []relay.Export
	add := func(signal string, x *otlp.SignalStats) {
		if x == nil {
			return
		}
		list = append(list, relay.Export{
			Signal: signal, Endpoint: x.Endpoint, Protocol: x.Protocol,
			Seen: x.Seen, Unsampled: x.Unsampled, Dropped: x.Dropped, Queued: x.Queued + x.InFlight, Capacity: x.Capacity,
			Sent: x.Sent, Failed: x.Failed, Rejected: x.Rejected, Overrun: s.Overrun,
			LastError: x.LastError, LastErrorAt: x.LastErrorAt, Failing: x.Failing,
		})
	}
	add("traces", s.Traces)
	add("logs", s.Logs)
	return list
}

// exportCounters is the same for metrics.
func (n *node) exportCounters() []prom.Counter {
	e := n.spans.now.Load()
	if e == nil {
		return nil
	}
	return append(otlpCounters(e.Stats(), time.Now()), n.requestCounters()...)
}

// otlpCounters makes metrics of an exporter's account.
func otlpCounters(s otlp.Stats, now time.Time) []prom.Counter {
	list := []prom.Counter{{
		Name: "kptrace_otlp_overrun_updates_total", Value: float64(s.Overrun),
		Help: "Updates of connections that came faster than the OTLP exporter read them.",
	}}
	for _, x := range []struct {
		signal string
		s      *otlp.SignalStats
	}{{"traces", s.Traces}, {"logs", s.Logs}} {
		if x.s == nil {
			continue
		}
		failing := 0.0
		if !x.s.Failing.IsZero() {
			failing = now.Sub(x.s.Failing).Seconds()
		}
		help := "Connections that ended while the OTLP exporter ran, by what became of them: sent, unsampled, dropped (the queue was full), failed (refused, given up, or left over)."
		for _, o := range []struct {
			outcome string
			n       uint64
		}{{"sent", x.s.Sent}, {"unsampled", x.s.Unsampled}, {"dropped", x.s.Dropped}, {"failed", x.s.Failed}} {
			list = append(list, prom.Counter{
				Name: "kptrace_otlp_connections_total", Help: help, Labels: []string{"signal", x.signal, "outcome", o.outcome}, Value: float64(o.n),
			})
			help = ""
		}
		add := func(name, help string, v float64, gauge bool) {
			list = append(list, prom.Counter{Name: name, Help: help, Labels: []string{"signal", x.signal}, Value: v, Gauge: gauge})
		}
		add("kptrace_otlp_items_total", "Spans or log records that the collector took.", float64(x.s.Items), false)
		add("kptrace_otlp_rejected_items_total", "Spans or log records that the collector took and said it will not keep.", float64(x.s.Rejected), false)
		add("kptrace_otlp_requests_total", "Requests that the collector answered well.", float64(x.s.Requests), false)
		add("kptrace_otlp_retries_total", "Requests that were tried again.", float64(x.s.Retries), false)
		add("kptrace_otlp_queue_connections", "Connections that wait to be sent, or are being sent.", float64(x.s.Queued+x.s.InFlight), true)
		add("kptrace_otlp_queue_connections_limit", "Connections that there is room for in the queue.", float64(x.s.Capacity), true)
		add("kptrace_otlp_failing_seconds", "How long nothing could be sent, 0 if all is well.", failing, true)
	}
	return list
}

package otlp

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	sdklog "go.opentelemetry.io/otel/sdk/log"

	"github.com/kptrace/kptrace/trace"
)

// Exporter sends Flows to an OpenTelemetry collector.
type Exporter struct {
	cfg     Config
	traces  *pipe // nil where the signal is off
	logs    *pipe
	spans   otlptrace.Client
	records sdklog.Exporter
	overrun atomic.Uint64
}

// New returns an Exporter for a Config. It reads the certificates the Config
// names, and sends nothing; that a collector answers is not needed.
func New(ctx context.Context, cfg Config) (*Exporter, error) {
	cfg.setDefaults()
	fail := func(err error) (*Exporter, error) { return nil, fmt.Errorf("otlp: %w", err) }
	if err := cfg.check(); err != nil {
		return fail(err)
	}
	secure, err := cfg.tls()
	if err != nil {
		return fail(err)
	}
	res, err := newResource(ctx, &cfg)
	if err != nil {
		return fail(fmt.Errorf("finding out where this runs: %w", err))
	}
	e := &Exporter{cfg: cfg}
	if !cfg.Traces.Off {
		e.spans = traceClient(&cfg, secure)
		if err := e.spans.Start(ctx); err != nil {
			return fail(err)
		}
		e.traces = newPipe("spans", cfg.Traces, &cfg)
		maker := newSpanMaker(res, cfg.Version)
		e.traces.send = func(ctx context.Context, flows []*trace.Flow) (int, error) {
			request, n := maker.request(flows, time.Now())
			return n, e.spans.UploadTraces(ctx, request)
		}
	}
	if !cfg.Logs.Off {
		if e.records, err = logExporter(ctx, &cfg, secure); err != nil {
			return fail(err)
		}
		e.logs = newPipe("log records", cfg.Logs, &cfg)
		maker := newLogMaker(res, cfg.Version, cfg.Sampling)
		e.logs.send = func(ctx context.Context, flows []*trace.Flow) (int, error) {
			list := maker.records(flows, time.Now())
			return len(list), e.records.Export(ctx, list)
		}
	}
	return e, nil
}

// Run exports what r brings until ctx ends or the ring is closed, then what is
// left, for as long as Config.Flush allows. That a collector is away is no
// error: see Stats. An Exporter runs once.
func (e *Exporter) Run(ctx context.Context, r *trace.Reader) error {
	var sending sync.WaitGroup
	for _, p := range []*pipe{e.traces, e.logs} {
		if p != nil {
			sending.Go(func() { p.run(ctx) })
		}
	}
	err := e.read(ctx, r)
	for _, p := range []*pipe{e.traces, e.logs} {
		if p != nil {
			close(p.queue)
		}
	}
	sending.Wait()
	closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if e.spans != nil {
		err = errors.Join(err, e.spans.Stop(closing))
	}
	if e.records != nil {
		err = errors.Join(err, e.records.Shutdown(closing))
	}
	if err != nil {
		return fmt.Errorf("otlp: %w", err)
	}
	return nil
}

// readEvery is how often at most the ring is read. In between its writer wakes
// nobody up.
const readEvery = 100 * time.Millisecond

// read queues what r brings, at the end also what is there already.
func (e *Exporter) read(ctx context.Context, r *trace.Reader) error {
	tick := time.NewTicker(readEvery)
	defer tick.Stop()
	for {
		flows, lost, err := r.Next(ctx)
		for {
			e.take(flows, lost)
			if flows, lost = r.Poll(); len(flows) == 0 && lost == 0 {
				break
			}
		}
		r.Losses() // others tell of them
		switch {
		case ctx.Err() != nil || errors.Is(err, trace.ErrClosed):
			return nil
		case err != nil:
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// take queues those Flows that have just been completed.
func (e *Exporter) take(flows []*trace.Flow, lost uint64) {
	e.overrun.Add(lost)
	for _, f := range flows {
		if !f.Completed {
			continue
		}
		if p := e.traces; p != nil {
			p.seen.Add(1)
			if e.cfg.Sampling.Keep(f) {
				p.put(f)
			} else {
				p.unsampled.Add(1)
			}
		}
		if p := e.logs; p != nil {
			p.seen.Add(1)
			p.put(f)
		}
	}
}

// Keep reports whether the spans of a completed Flow are wanted: see
// Sampling.Keep.
func (e *Exporter) Keep(f *trace.Flow) bool { return e.traces != nil && e.cfg.Sampling.Keep(f) }

// Wants reports whether a Flow that is about to end will be sent in any form,
// and so its counters are worth asking the kernel for.
func (e *Exporter) Wants(f *trace.Flow) bool { return e.logs != nil || e.Keep(f) }

// Stats may be called at any time from any goroutine.
func (e *Exporter) Stats() Stats {
	s := Stats{Overrun: e.overrun.Load()}
	if e.traces != nil {
		s.Traces = e.traces.stats(e.cfg.Endpoint)
	}
	if e.logs != nil {
		s.Logs = e.logs.stats(e.cfg.Endpoint)
	}
	return s
}

package stack

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
)

const (
	// outageRate is how many connections are made in a second without a
	// collector, if the machine makes as many.
	outageRate = 1000
	// outageMemory is what a node's kptrace may take, with its history of
	// 20,000 connections and a full queue.
	outageMemory = 256 << 20
)

// CheckOutage takes the collector away for a time in which many more
// connections are made than the queue has room for. All must work; each must be
// accounted for, as sent or as dropped; the collector that comes back must have
// taken what was sent; and memory must be bounded. Traffic must have stopped.
func (s *Stack) CheckOutage(ctx context.Context, away time.Duration) []Result {
	detail, err := s.longOutage(ctx, away)
	return []Result{result(fmt.Sprintf("the collector may be away for %v under load", away), err, "%s", detail)}
}

func (s *Stack) longOutage(ctx context.Context, away time.Duration) (string, error) {
	before, _, err := s.exports(ctx)
	if err != nil {
		return "", err
	}
	var items float64
	err = until(ctx, func() error { // Prometheus is a scrape behind
		sent, err := s.prometheusSum(ctx, `sum(kptrace_otlp_connections_total{signal="traces", outcome="sent"})`)
		if err == nil && sent != float64(before.Sent) {
			err = fmt.Errorf("stack: %d connections are sent, Prometheus has %v", before.Sent, sent)
		}
		if err != nil {
			return err
		}
		items, err = s.prometheusSum(ctx, `sum(kptrace_otlp_items_total{signal="traces"})`)
		return err
	})
	if err != nil {
		return "", err
	}
	if err := s.stop(Collector); err != nil {
		return "", err
	}
	made, err := s.connect(ctx, away)
	if err != nil {
		return "", err
	}
	e, failing, err := s.exports(ctx)
	if err != nil {
		return "", err
	}
	if failing == 0 || e.Dropped == before.Dropped {
		return "", fmt.Errorf("%d connections without a collector: %d nodes say that they cannot send, %d are dropped", made, failing, e.Dropped-before.Dropped)
	}
	peak, err := s.prometheusSum(ctx, fmt.Sprintf("max(max_over_time(process_resident_memory_bytes[%ds]))", int(away.Seconds())))
	if err != nil {
		return "", err
	}
	if err := s.startCollector(ctx); err != nil {
		return "", err
	}
	back := time.Now()
	var detail string
	err = until(ctx, func() error {
		e, failing, err := s.exports(ctx)
		if err != nil {
			return err
		}
		now, err := s.prometheusSum(ctx, `sum(kptrace_otlp_items_total{signal="traces"})`)
		if err != nil {
			return err
		}
		page, err := s.page(ctx, Collector, "/metrics")
		if err != nil {
			return err
		}
		took := sumOf(page, "otelcol_receiver_accepted_spans", "")
		seen, sent, dropped := e.Seen-before.Seen, e.Sent-before.Sent, e.Dropped-before.Dropped
		detail = fmt.Sprintf("%d connections, all worked; %d were sent, %d dropped; %.0f spans sent since, %.0f taken; at most %.0f MB; %v after it was back all was sent",
			made, sent, dropped, now-items, took, peak/1e6, time.Since(back).Round(time.Second))
		if failing > 0 || seen != uint64(made) || seen != sent+dropped || now-items != took || took == 0 || peak > outageMemory {
			return fmt.Errorf("%s; %d were seen, %d wait, %d failed, %d nodes cannot send", detail, seen, e.Queued, e.Failed-before.Failed, failing)
		}
		return nil
	})
	return detail, err
}

// connect makes connections to a Service for a time, and returns how many. None
// may fail.
func (s *Stack) connect(ctx context.Context, d time.Duration) (int, error) {
	pod, service, err := s.someClient()
	if err != nil {
		return 0, err
	}
	var out bytes.Buffer
	p, err := s.Lab().Exec(pod, exec.Spec{
		Path: "kptrace", Stdout: &out, Stderr: s.cfg.Output, OwnGroup: true,
		Args: []string{"lab", "load", "--target", service.String(), "--for", d.String(), "--rate", fmt.Sprint(outageRate), "-o", "json"},
	})
	if err != nil {
		return 0, err
	}
	select {
	case <-ctx.Done():
		_ = p.Kill()
		return 0, errors.Join(context.Cause(ctx), p.Wait())
	case <-p.Done():
	}
	var made struct {
		Done   int
		Errors map[string]int
	}
	if err := errors.Join(p.Wait(), json.Unmarshal(out.Bytes(), &made)); err != nil {
		return 0, fmt.Errorf("stack: making connections: %w", err)
	}
	if made.Done == 0 || len(made.Errors) > 0 {
		return 0, fmt.Errorf("stack: of %d connections without a collector some fail: %v", made.Done, made.Errors)
	}
	return made.Done, nil
}

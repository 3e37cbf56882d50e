package stack

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"
)

// CheckExemplars follows the exemplars of the latency histograms from
// Prometheus to Jaeger: each names a trace that is there.
func (s *Stack) CheckExemplars(ctx context.Context) []Result {
	n, err := s.checkExemplars(ctx)
	return []Result{result("exemplars lead to traces", err, "%d of %d looked up are in Jaeger", n, n)}
}

func (s *Stack) checkExemplars(ctx context.Context) (int, error) {
	q, err := s.Prometheus()
	if err != nil {
		return 0, err
	}
	var series []struct {
		Exemplars []struct {
			Labels map[string]string `json:"labels"`
		} `json:"exemplars"`
	}
	now := time.Now()
	if err := q.ask(ctx, "/api/v1/query_exemplars", url.Values{
		"query": {`{__name__=~"kptrace_connection_(establish|duration)_seconds_bucket"}`},
		"start": {now.Add(-time.Hour).Format(time.RFC3339)}, "end": {now.Add(time.Minute).Format(time.RFC3339)},
	}, &series); err != nil {
		return 0, err
	}
	traces := map[string]bool{}
	for _, x := range series {
		for _, e := range x.Exemplars {
			traces[e.Labels["trace_id"]] = true
		}
	}
	if len(traces) == 0 {
		return 0, errors.New("prometheus has no exemplars")
	}
	looked := 0
	for id := range traces {
		if looked == sampledReports {
			break
		}
		looked++
		list, err := s.traces(ctx, "/api/traces/"+id, nil)
		if err != nil {
			return looked, fmt.Errorf("trace %s of an exemplar: %w", id, err)
		}
		if len(list) == 0 {
			return looked, fmt.Errorf("trace %s of an exemplar is not in Jaeger", id)
		}
	}
	return looked, nil
}

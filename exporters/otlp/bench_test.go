package otlp

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/kptrace/kptrace/trace"
)

// BenchmarkExport measures what one connection costs from the queue to the
// wire: four spans, or one log record, in batches.
func BenchmarkExport(b *testing.B) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) }))
	defer srv.Close()
	e, err := New(b.Context(), Config{Endpoint: srv.URL, Node: "node1", Version: "v1"})
	if err != nil {
		b.Fatal(err)
	}
	batch := make([]*trace.Flow, 256)
	for i := range batch {
		batch[i] = good()
		batch[i].ID = trace.FlowID(i + 1)
	}
	for name, p := range map[string]*pipe{"spans": e.traces, "records": e.logs} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for n := 0; n < b.N; n += len(batch) {
				if _, err := p.send(context.Background(), batch); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("spans, not sent", func(b *testing.B) {
		b.ReportAllocs()
		res, err := newResource(b.Context(), &e.cfg)
		if err != nil {
			b.Fatal(err)
		}
		m := newSpanMaker(res, "v1")
		for n := 0; n < b.N; n += len(batch) {
			m.request(batch, time.Time{})
		}
	})
}

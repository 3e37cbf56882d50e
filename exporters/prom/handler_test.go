package prom

import (
	"compress/gzip"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// TestPacked: a real client gets the same, packed or not.
func TestPacked(t *testing.T) {
	w := big(t, 20, 20)
	srv := httptest.NewServer(w.e.Handler())
	defer srv.Close()
	get := func(encoding string) (string, string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, srv.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Accept-Encoding", encoding)
		res, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body := io.Reader(res.Body)
		if res.Header.Get("Content-Encoding") == "gzip" {
			if body, err = gzip.NewReader(res.Body); err != nil {
				t.Fatal(err)
			}
		}
		text, err := io.ReadAll(body)
		if err != nil || res.StatusCode != http.StatusOK {
			t.Fatal(res.Status, err)
		}
		return string(text), res.Header.Get("Content-Encoding")
	}
	plain, none := get("identity")
	packed, gz := get("deflate, gzip;q=0.5")
	if none != "" || gz != "gzip" {
		t.Errorf("encodings %q, %q", none, gz)
	}
	if a, b := len(plain), len(packed); a < 500_000 || b < a-a/100 || b > a+a/100 {
		t.Errorf("%d bytes plain, %d packed", a, b)
	}
	if _, enc := get("gzip;q=0"); enc != "" {
		t.Errorf("encoding %q although refused", enc)
	}
}

// TestFormats: OpenMetrics carries exemplars, protobuf native histograms beside
// the classic ones, and each can be left out.
func TestFormats(t *testing.T) {
	get := func(cfg FlowConfig, accept string) string {
		w := busy(t, cfg)
		req := httptest.NewRequest(http.MethodGet, "/metrics", nil)
		req.Header.Set("Accept", accept)
		rec := httptest.NewRecorder()
		w.e.Handler().ServeHTTP(rec, req)
		return rec.Body.String()
	}
	text := get(FlowConfig{}, "application/openmetrics-text;version=1.0.0")
	if !strings.HasSuffix(text, "# EOF\n") || !strings.Contains(text, `# {trace_id="`) {
		t.Errorf("no exemplars, or no end:\n%s", text)
	}
	if text := get(FlowConfig{Histograms: HistogramsOff}, "text/plain"); strings.Contains(text, famEstablish+"_bucket") {
		t.Error("histograms, although off")
	}
	for classic, native := range map[bool]bool{false: true, true: false} {
		w := busy(t, FlowConfig{ClassicOnly: classic})
		for _, f := range gathered(t, w.e) {
			if f.GetName() != famEstablish {
				continue
			}
			h := f.GetMetric()[0].GetHistogram()
			if got := len(h.GetPositiveSpan()) > 0 && h.Schema != nil; got != native || len(h.GetBucket()) != 12 || h.GetSampleCount() != 3 {
				t.Errorf("classic only %v: native %v, %d buckets, %d values", classic, got, len(h.GetBucket()), h.GetSampleCount())
			}
		}
	}
}

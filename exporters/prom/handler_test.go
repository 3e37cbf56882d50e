package prom

import (
	"compress/gzip"
	"io"
	"net/http"
	"net/http/httptest"
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

package node

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

func TestMetricsMux(t *testing.T) {
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "up 1\n") })
	cfg := HTTPConfig{Configz: []byte(`{"kubeproxy.config.k8s.io":{}}`)}
	ask := func(path string) (int, string) {
		rec := httptest.NewRecorder()
		metricsMux(cfg, "iptables", metrics).ServeHTTP(rec, httptest.NewRequest(http.MethodGet, path, nil))
		return rec.Code, rec.Body.String()
	}
	for path, want := range map[string]string{
		"/metrics": "up 1\n", "/proxyMode": "iptables", "/healthz": "ok", "/configz": `{"kubeproxy.config.k8s.io":{}}`,
	} {
		if code, body := ask(path); code != 200 || body != want {
			t.Errorf("%s: %d %q, want %q", path, code, body, want)
		}
	}
	if code, _ := ask("/debug/pprof/"); code != 404 {
		t.Errorf("profiling answers %d without being asked for", code)
	}
	cfg.Profiling = true
	if code, _ := ask("/debug/pprof/"); code != 200 {
		t.Errorf("profiling answers %d", code)
	}
}

// TestServeHTTP holds a port: with hardFail that is the end, without it the
// address is had when it is free.
func TestServeHTTP(t *testing.T) {
	t.Parallel()
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := busy.Addr().String()
	logger := slog.New(slog.DiscardHandler)
	h := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "here") })
	failures := 0
	s := server{what: "metrics", addr: addr, handler: h, logger: logger, hardFail: true, failed: func(error) { failures++ }}
	if err := s.run(context.Background()); err == nil {
		t.Error("no error for a port that is taken")
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	s.hardFail, s.again = false, 20*time.Millisecond
	go func() { done <- s.run(ctx) }()
	time.Sleep(50 * time.Millisecond)
	busy.Close()
	got := ""
	for end := time.Now().Add(5 * time.Second); got == "" && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if res, err := http.Get("http://" + addr); err == nil {
			body, _ := io.ReadAll(res.Body)
			res.Body.Close()
			got = string(body)
		}
	}
	if got != "here" {
		t.Errorf("got %q after the port was free", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if failures != 1 {
		t.Errorf("told of %d failures, want one for the time it was taken", failures)
	}
}

package node

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestMetricsMux(t *testing.T) {
	says := func(text string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, text) })
	}
	level, checks := 0, 0
	s := metricsServer{
		HTTPConfig: HTTPConfig{
			Configz: []byte(`{"kubeproxy.config.k8s.io":{}}`), Flags: map[string]string{"v": "0", "cluster-cidr": "10.0.0.0/8"},
			Verbosity: func(n int) { level = n },
		},
		mode: "iptables", version: "v1.2.3", started: time.Now().Add(-3661 * time.Second), metrics: says("up 1\n"), slis: says("slis"),
		checked: func(name, kind string, ok bool) { checks++ },
	}
	mux := s.mux()
	ask := func(method, path, accept, body string) (int, string) {
		rec := httptest.NewRecorder()
		req := httptest.NewRequest(method, path, strings.NewReader(body))
		req.Header.Set("Accept", accept)
		mux.ServeHTTP(rec, req)
		return rec.Code, rec.Body.String()
	}
	get := func(path string) (int, string) { return ask(http.MethodGet, path, "", "") }
	for path, want := range map[string]string{
		"/metrics": "up 1\n", "/metrics/slis": "slis", "/proxyMode": "iptables", "/healthz": "ok", "/healthz/ping": "ok",
		"/healthz?verbose": "[+]ping ok\nhealthz check passed\n", "/configz": `{"kubeproxy.config.k8s.io":{}}`,
	} {
		if code, body := get(path); code != 200 || body != want {
			t.Errorf("%s: %d %q, want %q", path, code, body, want)
		}
	}
	if checks != 2 {
		t.Errorf("told of %d checks, want 2", checks)
	}
	if code, body := get("/flagz"); code != 200 || !strings.HasPrefix(body, "\nkube-proxy flagz\n") || !strings.HasSuffix(body, "\ncluster-cidr=10.0.0.0/8\nv=0\n") {
		t.Errorf("/flagz: %d %q", code, body)
	}
	if code, body := get("/statusz"); code != 200 || !strings.Contains(body, "Up: 1 hr 01 min 0") || !strings.Contains(body, "Binary version: v1.2.3\n") ||
		!strings.Contains(body, "Paths: /configz /flagz /healthz /metrics /proxyMode\n") {
		t.Errorf("/statusz: %d %q", code, body)
	}
	const structured = "application/json;v=%s;g=config.k8s.io;as=%s"
	for path, kind := range map[string]string{"/flagz": "Flagz", "/statusz": "Statusz"} {
		for _, version := range []string{"v1beta1", "v1alpha1"} {
			code, body := ask(http.MethodGet, path, "application/xml, "+fmt.Sprintf(structured, version, kind)+", text/plain", "")
			var o struct {
				Kind, APIVersion string
				Metadata         struct{ Name string }
				Flags            map[string]string
				UptimeSeconds    int
				Paths            []string
			}
			if err := json.Unmarshal([]byte(body), &o); err != nil || code != 200 || o.Kind != kind || o.APIVersion != "config.k8s.io/"+version || o.Metadata.Name != "kube-proxy" ||
				len(o.Flags)+len(o.Paths) < 2 || kind == "Statusz" && o.UptimeSeconds < 3661 {
				t.Errorf("%s %s: %v %d %s", path, version, err, code, body)
			}
		}
		for accept, want := range map[string]int{
			"*/*": 200, "text/plain": 200, "application/json": 406, "application/xml": 406, "text/html, */*;q=0.1": 200,
			fmt.Sprintf(structured, "v1", kind): 406, fmt.Sprintf(structured, "v1beta1", "Other"): 406,
		} {
			if code, body := ask(http.MethodGet, path, accept, ""); code != want || code == 200 && !strings.Contains(body, "kube-proxy") {
				t.Errorf("%s, accepting %s: %d %q, want %d", path, accept, code, body, want)
			}
		}
	}
	for _, path := range []string{"/debug/pprof/", "/debug/flags/v"} {
		if code, _ := get(path); code != 404 {
			t.Errorf("%s answers %d without being asked for", path, code)
		}
	}
	s.Profiling = true
	mux = s.mux()
	if code, _ := get("/debug/pprof/"); code != 200 {
		t.Errorf("profiling answers %d", code)
	}
	if code, _ := get("/debug/pprof/cmdline"); code != 404 {
		t.Errorf("the command line answers %d", code)
	}
	if code, _ := ask(http.MethodPut, "/debug/flags/v", "", "4"); code != 200 || level != 4 {
		t.Errorf("setting the log level: %d, %d", code, level)
	}
	if code, _ := ask(http.MethodPut, "/debug/flags/v", "", "loud"); code != 400 || level != 4 {
		t.Errorf("setting no log level: %d, %d", code, level)
	}
	if code, _ := get("/debug/flags/v"); code != 406 {
		t.Errorf("reading the log level: %d", code)
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

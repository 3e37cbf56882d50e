package prom

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestSLIs(t *testing.T) {
	e := New(Config{Families: []string{IPv4}, Started: time.Unix(1000, 0)})
	ask := func(method string) string {
		rec := httptest.NewRecorder()
		e.SLIs().ServeHTTP(rec, httptest.NewRequest(method, "/metrics/slis", nil))
		if rec.Code != http.StatusOK {
			t.Fatalf("%s: %d", method, rec.Code)
		}
		return rec.Body.String()
	}
	e.Checked("ping", "healthz", false)
	e.Checked("ping", "healthz", true)
	e.Checked("ping", "healthz", true)
	got := ask(http.MethodGet)
	for _, want := range []string{
		`kubernetes_healthcheck{name="ping",type="healthz"} 1`,
		`kubernetes_healthchecks_total{name="ping",status="error",type="healthz"} 1`,
		`kubernetes_healthchecks_total{name="ping",status="success",type="healthz"} 2`,
		"process_start_time_seconds 1000",
	} {
		if !strings.Contains(got, want+"\n") {
			t.Errorf("no %s in\n%s", want, got)
		}
	}
	ask(http.MethodDelete)
	if got := ask(http.MethodGet); strings.Contains(got, "kubernetes_healthcheck{") {
		t.Errorf("after a reset:\n%s", got)
	}
}

package health

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/kptrace/kptrace/proxy"
)

// probe asks a path and returns the code and the body as it went out.
func probe(t *testing.T, h http.Handler, path string) (int, map[string]any) {
	t.Helper()
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, path, nil))
	var body map[string]any
	if err := json.Unmarshal(rec.Body.Bytes(), &body); err != nil {
		t.Fatalf("%s: %v: %s", path, err, rec.Body)
	}
	if ct := rec.Header().Get("Content-Type"); ct != "application/json" {
		t.Errorf("%s: Content-Type %q", path, ct)
	}
	if n := rec.Header().Get("X-Content-Type-Options"); n != "nosniff" {
		t.Errorf("%s: X-Content-Type-Options %q", path, n)
	}
	return rec.Code, body
}

// TestProbes goes through the states of a proxy and its node.
func TestProbes(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	const stamp = "2006-01-02T15:04:05Z07:00"
	tests := map[string]struct {
		stats          proxy.SyncStats
		draining       bool
		healthz, livez int
		lastUpdated    time.Time
		families       int
	}{
		"starting": {healthz: 200, livez: 200, lastUpdated: now},
		"at rest for a day": {
			stats:   proxy.SyncStats{Syncs: 1, LastSuccess: ago(24 * time.Hour)},
			healthz: 200, livez: 200, lastUpdated: now, families: 2,
		},
		"a change is on its way": {
			stats:   proxy.SyncStats{Pending: true, PendingSince: ago(59 * time.Second), LastSuccess: ago(time.Hour)},
			healthz: 200, livez: 200, lastUpdated: now, families: 2,
		},
		"a change waits too long": {
			stats:   proxy.SyncStats{Pending: true, PendingSince: ago(time.Minute), LastSuccess: ago(time.Hour)},
			healthz: 503, livez: 503, lastUpdated: ago(time.Hour), families: 2,
		},
		// Upstream stayed green here, kubernetes/kubernetes#105742: the lock
		// is never had, every sync ends soon and with an error.
		"every sync fails": {
			stats: proxy.SyncStats{
				Syncs: 40, Failures: 40, Pending: true, PendingSince: ago(5 * time.Minute), Queued: ago(time.Second),
				LastEnd: ago(time.Second), LastError: errors.New("lock held"),
			},
			healthz: 503, livez: 503, families: 2,
		},
		"draining": {
			stats: proxy.SyncStats{Syncs: 1, LastSuccess: ago(time.Hour)}, draining: true,
			healthz: 503, livez: 200, lastUpdated: ago(time.Hour), families: 2,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			codes := map[string]int{}
			src := &Source{
				Stats:    func() proxy.SyncStats { return tt.stats },
				Eligible: func() bool { return !tt.draining },
				Families: []Family{IPv4, IPv6},
				Now:      func() time.Time { return now },
			}
			mux := src.Mux(func(c int) { codes["healthz"] = c }, func(c int) { codes["livez"] = c })
			code, body := probe(t, mux, "/healthz")
			if code != tt.healthz || codes["healthz"] != tt.healthz {
				t.Errorf("/healthz: %d, told %d, want %d", code, codes["healthz"], tt.healthz)
			}
			if got := body["lastUpdated"]; got != tt.lastUpdated.Format(stamp) {
				t.Errorf("lastUpdated %v, want %v", got, tt.lastUpdated)
			}
			if body["currentTime"] != now.Format(stamp) || body["nodeEligible"] != !tt.draining {
				t.Errorf("/healthz: %v", body)
			}
			healthy := tt.livez == 200
			if body["healthy"] != healthy {
				t.Errorf("healthy %v: it speaks of the proxy alone", body["healthy"])
			}
			status, _ := body["status"].(map[string]any)
			if len(status) != tt.families {
				t.Errorf("status %v, want %d families", status, tt.families)
			}
			for f, s := range status {
				if s.(map[string]any)["healthy"] != healthy {
					t.Errorf("status of %s: %v", f, s)
				}
			}
			code, body = probe(t, mux, "/livez")
			if _, ok := body["nodeEligible"]; ok || code != tt.livez || codes["livez"] != tt.livez {
				t.Errorf("/livez: %d %v, told %d, want %d", code, body, codes["livez"], tt.livez)
			}
		})
	}
}

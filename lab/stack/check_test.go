package stack

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/lab"
)

// answers plays Prometheus for what checks do with its answers; the real one
// is asked by kptrace lab stack --check.
func answers(t *testing.T, value func(expr string) string, rules string) *Querier {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/api/v1/rules" {
			fmt.Fprintf(w, `{"status":"success","data":%s}`, rules)
			return
		}
		v := value(r.URL.Query().Get("query"))
		switch v {
		case "":
			fmt.Fprint(w, `{"status":"success","data":{"resultType":"vector","result":[]}}`)
		case "error":
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, `{"status":"error","error":"parse error"}`)
		default:
			fmt.Fprintf(w, `{"status":"success","data":{"resultType":"vector","result":[{"metric":{"pod":"a"},"value":[1,%q]}]}}`, v)
		}
	}))
	t.Cleanup(srv.Close)
	return &Querier{Client: srv.Client(), URL: srv.URL}
}

func verdict(list []Result) (ok bool, text string) {
	ok = true
	for _, r := range list {
		ok = ok && r.OK
		text += r.Detail + "\n"
	}
	return ok, text
}

// TestFigures: a counter that is off by one is found.
func TestFigures(t *testing.T) {
	c := &lab.Cluster{Services: []lab.Service{{
		Namespace: "shop", Name: "foo", Port: "http", Proto: conntrack.TCP,
		ClusterIP: netip.MustParseAddr("10.96.0.1"), Number: 80,
	}}}
	report := func(port uint16, server, err string) lab.Report {
		return lab.Report{
			Proto: conntrack.TCP, Local: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), port),
			Remote: netip.MustParseAddrPort("10.96.0.1:80"), Server: server, Err: err, Established: -1, Start: time.Now(),
		}
	}
	reports := []lab.Report{report(1, "shop/a", ""), report(2, "shop/a", ""), report(3, "", lab.FailRefused), report(4, "", lab.FailTimeout)}
	true4 := func(expr string) string {
		switch {
		case strings.Contains(expr, "started"):
			return "4"
		case strings.Contains(expr, `outcome="closed", pod="a"`):
			return "2"
		}
		return "1"
	}
	if ok, text := verdict(answers(t, true4, "").checkFigures(t.Context(), c, reports, "iptables")); !ok {
		t.Error(text)
	}
	for _, mutate := range []string{"started", "refused", "timeout", "closed"} {
		q := answers(t, func(expr string) string {
			if strings.Contains(expr, mutate) {
				return "3"
			}
			return true4(expr)
		}, "")
		if ok, text := verdict(q.checkFigures(t.Context(), c, reports, "iptables")); ok {
			t.Errorf("3 %s pass: %s", mutate, text)
		}
	}
}

// TestQueries: no data, without a reason, is found; so are errors and NaN.
func TestQueries(t *testing.T) {
	for name, tt := range map[string]struct {
		value string
		ok    bool
	}{"data": {"1", true}, "nothing": {"", false}, "NaN": {"NaN", false}, "error": {"error", false}} {
		q := answers(t, func(expr string) string {
			if strings.Contains(expr, "kptrace_connections_open") {
				return tt.value
			}
			return "1"
		}, "")
		if ok, text := verdict(q.checkQueries(t.Context(), "iptables")); ok != tt.ok {
			t.Errorf("%s: %v %s", name, ok, text)
		}
	}
	q := answers(t, func(expr string) string {
		if strings.Contains(expr, "kptrace_ipvs_") {
			return ""
		}
		return "1"
	}, "")
	if ok, _ := verdict(q.checkQueries(t.Context(), "iptables")); !ok {
		t.Error("IPVS is asked for in iptables mode")
	}
	if ok, _ := verdict(q.checkQueries(t.Context(), "ipvs")); ok {
		t.Error("IPVS is not missed in IPVS mode")
	}
}

// TestRules: a rule that does not evaluate, an alert too many and one too few
// are found.
func TestRules(t *testing.T) {
	type alert struct {
		Labels map[string]string `json:"labels"`
	}
	type rule struct {
		Name   string  `json:"name"`
		Health string  `json:"health"`
		Type   string  `json:"type"`
		Alerts []alert `json:"alerts"`
	}
	good := func() []rule {
		return []rule{
			{"a:b:c", "ok", "recording", nil},
			{"KptraceDeadEndpointTakesTraffic", "ok", "alerting", []alert{{map[string]string{"pod": "dead"}}, {map[string]string{"pod": "tired"}}}},
			{"KptraceConnectionsRejected", "ok", "alerting", []alert{{map[string]string{"reason": "no-endpoints"}}}},
			{"KptraceConnectionsUnanswered", "ok", "alerting", []alert{{map[string]string{"alertname": "KptraceConnectionsUnanswered"}}}},
			{"KptraceDrift", "ok", "alerting", nil},
		}
	}
	judge := func(rules []rule) (bool, string) {
		type groups struct {
			Groups []map[string]any `json:"groups"`
		}
		text, err := json.Marshal(groups{[]map[string]any{{"rules": rules}}})
		if err != nil {
			t.Fatal(err)
		}
		return verdict(answers(t, func(string) string { return "1" }, string(text)).checkRules(t.Context(), []string{"dead"}, []string{"tired"}))
	}
	if ok, text := judge(good()); !ok {
		t.Error(text)
	}
	for name, mutate := range map[string]func([]rule) []rule{
		"none":      func([]rule) []rule { return nil },
		"unhealthy": func(r []rule) []rule { r[0].Health = "err"; return r },
		"too few":   func(r []rule) []rule { r[1].Alerts = r[1].Alerts[1:]; return r },
		"wrong pod": func(r []rule) []rule {
			r[1].Alerts = append(r[1].Alerts, alert{map[string]string{"pod": "well"}})
			return r
		},
		"too many": func(r []rule) []rule { r[4].Alerts = []alert{{map[string]string{"instance": "n1"}}}; return r },
	} {
		if ok, _ := judge(mutate(good())); ok {
			t.Errorf("%s: passes", name)
		}
	}
}

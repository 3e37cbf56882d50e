package stack

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/dashboards"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/lab"
)

// Result is what a check came to.
type Result struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
	// Detail says what was compared, or what is wrong.
	Detail string `json:"detail"`
}

func result(name string, err error, detail string, args ...any) Result {
	if err != nil {
		return Result{Name: name, Detail: err.Error()}
	}
	return Result{Name: name, OK: true, Detail: fmt.Sprintf(detail, args...)}
}

// Change edits the lab's manifests as an API server would tell of it: with the
// time of the change, from which programming latency is measured.
func (s *Stack) Change() error {
	text := fmt.Sprintf(lateService, time.Now().UTC().Format(time.RFC3339Nano))
	if err := os.WriteFile(filepath.Join(s.cfg.Lab.Dir(), "90-late.yaml"), []byte(text), 0o644); err != nil {
		return fmt.Errorf("stack: %w", err)
	}
	return nil
}

const lateService = `apiVersion: v1
kind: Service
metadata: {name: late, namespace: shop}
spec:
  clusterIP: 10.96.0.99
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: late-1
  namespace: shop
  labels: {kubernetes.io/service-name: late}
  annotations: {endpoints.kubernetes.io/last-change-trigger-time: %q}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.244.1.21], nodeName: node1, targetRef: {kind: Pod, name: foo-1, namespace: shop}}
`

// settleTime is how long connections may take to end once no client makes new
// ones: unanswered ones last until their conntrack entry goes.
const settleTime = 90 * time.Second

// Settle waits until Prometheus has seen the end of every connection. Call it
// after Lab.StopTraffic.
func (q *Querier) Settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	last, same := -1.0, 0
	for {
		started, err := q.Sum(ctx, "kptrace_connections_started_total")
		if err != nil {
			return err
		}
		ended, err := q.Sum(ctx, "kptrace_connections_ended_total")
		if err != nil {
			return err
		}
		// The same three times: two scrapes apart, nothing new came.
		if same++; started != last || started != ended {
			last, same = started, 0
		}
		if same >= 3 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("stack: %v connections started, %v ended: %w", started, ended, context.Cause(ctx))
		case <-time.After(ScrapeEvery):
		}
	}
}

// CheckPrometheus holds what Prometheus has against what clients reported: the
// figures, every query of every panel, every rule, and the metrics themselves.
// mode is the nodes' proxy mode, dead the pods that fail all the time, and
// troubled those that failed for a while.
func (s *Stack) CheckPrometheus(ctx context.Context, reports []lab.Report, mode string, dead, troubled []string) []Result {
	q, err := s.Prometheus()
	if err != nil {
		return []Result{result("prometheus", err, "")}
	}
	all := q.checkFigures(ctx, s.cfg.Lab.Cluster(), reports, mode)
	all = append(all, q.checkQueries(ctx, mode)...)
	all = append(all, q.checkRules(ctx, dead, troubled)...)
	return append(all, s.checkMetrics(ctx)...)
}

// tally is what clients counted of one Service port.
type tally struct {
	made, refused, timeout int
	tuples                 map[conntrack.Tuple]bool
	answered               map[string]int // by pod
}

func tallies(c *lab.Cluster, reports []lab.Report) map[*lab.Service]*tally {
	all := map[*lab.Service]*tally{}
	for i := range c.Services {
		all[&c.Services[i]] = &tally{answered: map[string]int{}, tuples: map[conntrack.Tuple]bool{}}
	}
	for i := range reports {
		r := &reports[i]
		svc := serviceOf(c, r.Proto, r.Remote)
		if svc == nil || r.Local.Port() == 0 {
			continue
		}
		t := all[svc]
		t.made++
		t.tuples[r.Tuple()] = true
		switch {
		case r.Server != "":
			t.answered[r.Server]++
		case r.Err == lab.FailRefused || r.Err == lab.FailUnreachable:
			t.refused++
		case r.Err == lab.FailTimeout && r.Established < 0:
			t.timeout++
		}
	}
	return all
}

func serviceOf(c *lab.Cluster, proto conntrack.Proto, to netip.AddrPort) *lab.Service {
	for i := range c.Services {
		v := &c.Services[i]
		node := func(n lab.Node) bool { return n.Addr == to.Addr() }
		if v.Proto == proto && (v.ClusterIP == to.Addr() && v.Number == to.Port() ||
			v.NodePort != 0 && v.NodePort == to.Port() && slices.ContainsFunc(c.Nodes, node)) {
			return v
		}
	}
	return nil
}

// checkFigures compares counters with what clients and servers counted.
func (q *Querier) checkFigures(ctx context.Context, c *lab.Cluster, reports []lab.Report, mode string) []Result {
	var all []Result
	for v, t := range tallies(c, reports) {
		if t.made == 0 {
			continue
		}
		labels := fmt.Sprintf(`namespace=%q, service=%q, port=%q`, v.Namespace, v.Name, v.Port)
		name := "figures of " + v.Namespace + "/" + v.Name
		var wrong []string
		compare := func(what, expr string, least, most int) {
			got, err := q.Sum(ctx, expr)
			if err != nil {
				wrong = append(wrong, err.Error())
			} else if got < float64(least) || got > float64(most) {
				wrong = append(wrong, fmt.Sprintf("%s: Prometheus has %v, clients counted %d", what, got, most))
			}
		}
		// A datagram from a port used shortly before belongs to the flow there is.
		least := t.made
		if v.Proto == conntrack.UDP {
			least = len(t.tuples)
		}
		compare("connections", `kptrace_connections_started_total{`+labels+`}`, least, t.made)
		if mode == "userspace" {
			// The proxy itself accepts; a client only sees that nothing comes.
			failed := t.made
			for _, n := range t.answered {
				failed -= n
			}
			compare("not answered", `kptrace_connections_ended_total{`+labels+`, outcome!="closed"}`, failed, failed)
		} else {
			compare("refused", `kptrace_connections_ended_total{`+labels+`, outcome=~"refused|rejected"}`, t.refused, t.refused)
			compare("timed out", `kptrace_connections_ended_total{`+labels+`, outcome="timeout"}`, t.timeout, t.timeout)
		}
		for pod, n := range t.answered {
			least := n
			if v.Proto == conntrack.UDP {
				least = n - (t.made - len(t.tuples))
			}
			_, short, _ := strings.Cut(pod, "/")
			compare("answered by "+pod, fmt.Sprintf(`kptrace_connections_ended_total{%s, outcome="closed", pod=%q}`, labels, short), least, n)
		}
		var err error
		if len(wrong) > 0 {
			err = fmt.Errorf("%s", strings.Join(wrong, "; "))
		}
		all = append(all, result(name, err, "%d connections, %d refused, %d timed out, answers of %d pods", t.made, t.refused, t.timeout, len(t.answered)))
	}
	slices.SortFunc(all, func(a, b Result) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// reason is why a query may have no answer.
type reason struct {
	modes []string // nil is every mode
	expr  *regexp.Regexp
	why   string
}

// reasons lists what a healthy lab has nothing to say about.
func reasons() []reason {
	r := func(expr, why string, modes ...string) reason { return reason{modes, regexp.MustCompile(expr), why} }
	list := []reason{
		r(`kptrace_ipvs_`, "there is no IPVS in this mode", "iptables", "userspace"),
		r(`kubeproxy_sync_proxy_rules_iptables_(total|last)`, "there are no iptables rules to count in this mode", "ipvs", "userspace"),
		r(`kptrace_affinity_list_`, "xt_recent keeps affinity in iptables mode alone", "ipvs", "userspace"),
		r(`kptrace_reroutes_total`, "the kernel does not try another endpoint in this mode", "iptables", "ipvs"),
		r(`kptrace_retries_total`, "no endpoint is tried twice for one connection"),
		r(`kptrace_proxy_drift_total`, "nobody watches the rules in this mode", "userspace"),
		r(`outcome="reset"`, "no connection of the scenario is reset"),
		r(`kptrace_check_findings`, "a check that finds nothing has no findings"),
		r(`kubeproxy_conntrack_reconciler_sync_duration_seconds`, "no UDP endpoint moves"),
		r(`kubeproxy_iptables_(ct_state_invalid|localhost_nodeports)`, "they are absent where the kernel has no nfacct"),
		r(`kptrace_userspace_`, "nothing is relayed in this mode", "iptables", "ipvs"),
		r(`kptrace_endpoint(s_out|_outs|_probes|_connections_freed)`, "--server-health is off in the lab unless it is given"),
		r(`kptrace_reroute_`, "--reroute-unanswered is off in the lab"),
	}
	if !HasTracing() {
		list = append(list, r(`kptrace_(otlp|traceparent)_`, "there is no collector"))
	}
	return append(list, r(`kptrace_traceparent_`, "requests are looked for in iptables mode alone", "ipvs", "userspace"))
}

// checkQueries asks everything that panels and variables ask.
func (q *Querier) checkQueries(ctx context.Context, mode string) []Result {
	queries, err := dashboards.Queries()
	if err != nil {
		return []Result{result("queries", err, "")}
	}
	var wrong, empty []string
	for _, x := range queries {
		answer, err := q.Query(ctx, x.Substitute(nil, "5m"))
		if err != nil {
			wrong = append(wrong, x.Where+": "+err.Error())
			continue
		}
		if slices.ContainsFunc(answer, func(x Sample) bool { return !math.IsNaN(x.Value) }) {
			continue
		}
		why := ""
		for _, r := range reasons() {
			if r.expr.MatchString(x.Expr) && (r.modes == nil || slices.Contains(r.modes, mode)) {
				why = r.why
			}
		}
		if why == "" {
			wrong = append(wrong, x.Where+": no data: "+x.Substitute(nil, "5m"))
			continue
		}
		empty = append(empty, x.Where+": "+why)
	}
	if len(wrong) > 0 {
		err = fmt.Errorf("%d of %d queries: %s", len(wrong), len(queries), strings.Join(wrong, "\n"))
	}
	detail := fmt.Sprintf("all %d have data", len(queries)-len(empty))
	if len(empty) > 0 {
		detail += fmt.Sprintf("; %d have none for a reason:\n%s", len(empty), strings.Join(empty, "\n"))
	}
	return []Result{result("queries of panels and variables", err, "%s", detail)}
}

// checkRules has every rule evaluated, and the alerts be about what was made
// to fail.
func (q *Querier) checkRules(ctx context.Context, dead, troubled []string) []Result {
	var data struct {
		Groups []struct {
			Rules []struct {
				Name, Query, Health, LastError, Type string
				Alerts                               []struct{ Labels map[string]string }
			}
		}
	}
	if err := q.ask(ctx, "/api/v1/rules", url.Values{}, &data); err != nil {
		return []Result{result("rules", err, "")}
	}
	count := 0
	var wrong []string
	alerts := map[string][]map[string]string{}
	for _, g := range data.Groups {
		for _, r := range g.Rules {
			count++
			if r.Health != "ok" {
				wrong = append(wrong, fmt.Sprintf("%s is %s: %s", r.Name, r.Health, r.LastError))
			}
			if r.Type == "recording" {
				if answer, err := q.Query(ctx, r.Query); err != nil || len(answer) == 0 {
					wrong = append(wrong, fmt.Sprintf("%s has no data: %v", r.Name, err))
				}
				continue
			}
			for _, a := range r.Alerts {
				alerts[r.Name] = append(alerts[r.Name], a.Labels)
			}
		}
	}
	has := func(alert, label, value string) {
		if !slices.ContainsFunc(alerts[alert], func(l map[string]string) bool { return l[label] == value }) {
			wrong = append(wrong, fmt.Sprintf("no alert %s with %s=%s", alert, label, value))
		}
	}
	for _, pod := range dead {
		has("KptraceDeadEndpointTakesTraffic", "pod", pod)
	}
	has("KptraceConnectionsRejected", "reason", "no-endpoints")
	has("KptraceConnectionsUnanswered", "alertname", "KptraceConnectionsUnanswered")
	for _, l := range alerts["KptraceDeadEndpointTakesTraffic"] {
		if !slices.Contains(dead, l["pod"]) && !slices.Contains(troubled, l["pod"]) {
			wrong = append(wrong, "an alert about a pod that is well: "+l["pod"])
		}
	}
	for name := range alerts {
		switch name {
		case "KptraceDeadEndpointTakesTraffic", "KptraceConnectionsRejected", "KptraceConnectionsUnanswered":
		default:
			wrong = append(wrong, fmt.Sprintf("alert %s, although all is well there: %v", name, alerts[name]))
		}
	}
	var err error
	if len(wrong) > 0 {
		err = fmt.Errorf("%s", strings.Join(wrong, "\n"))
	}
	if count == 0 {
		err = fmt.Errorf("prometheus has no rules")
	}
	return []Result{result("rules", err, "all %d evaluate; the alerts are about the faults that were made, and nothing else", count)}
}

// checkMetrics has promtool look at what a node serves.
func (s *Stack) checkMetrics(ctx context.Context) []Result {
	var all []Result
	for _, n := range s.cfg.Lab.Cluster().Nodes {
		client := s.Dialer(n.Name, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), MetricsPort))
		problems, size, err := lint(ctx, client)
		if err == nil && len(problems) > 0 {
			err = fmt.Errorf("%s", strings.Join(problems, "\n"))
		}
		all = append(all, result("promtool check metrics, "+n.Name, err, "%d bytes, no problem but in kube-proxy's own names", size))
	}
	return all
}

func lint(ctx context.Context, client *http.Client) (problems []string, size int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://node/metrics", nil)
	if err != nil {
		return nil, 0, err
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, 0, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, 0, err
	}
	out, err := exec.Run(ctx, exec.Spec{Path: "promtool", Args: []string{"check", "metrics"}, Stdin: bytes.NewReader(text)})
	if err != nil && out.ExitCode != 3 { // 3 says that there are problems
		return nil, 0, err
	}
	for line := range strings.Lines(string(out.Stdout) + string(out.Stderr)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "kubeproxy_") {
			problems = append(problems, line)
		}
	}
	return problems, len(text), nil
}

package stack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/kptrace/kptrace/dashboards"
	"github.com/kptrace/kptrace/internal/exec"
)

// Prometheus is the name of the server that scrapes the nodes.
const Prometheus = "prometheus"

// MetricsPort is where each node serves its metrics: kube-proxy's port.
const MetricsPort = 10249

// ProxyArgs are what nodes need to be scraped.
func ProxyArgs() []string {
	return []string{"--metrics-bind-address", fmt.Sprintf("0.0.0.0:%d", MetricsPort), "--metrics-clients", "20"}
}

// ScrapeEvery is how often nodes are scraped and rules evaluated. Rates over
// five minutes, as in the dashboards, need two scrapes.
const ScrapeEvery = time.Second

// StartPrometheus runs Prometheus on the first node; it scrapes all of them
// and evaluates kptrace's rules.
func (s *Stack) StartPrometheus(ctx context.Context) error {
	program, err := exec.LookPath(Prometheus)
	if err != nil {
		return fmt.Errorf("stack: Prometheus is missing; make deps, or scripts/deps.sh, gets it: %w", err)
	}
	dir := filepath.Join(s.cfg.Dir, Prometheus)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("stack: %w", err)
	}
	rules := filepath.Join(dir, "rules.yaml")
	config := filepath.Join(dir, "prometheus.yaml")
	if err := errors.Join(
		os.WriteFile(rules, dashboards.Rules(), 0o644),
		os.WriteFile(config, []byte(s.scrapeConfig(rules)), 0o644),
	); err != nil {
		return fmt.Errorf("stack: %w", err)
	}
	page := netip.MustParseAddrPort("127.0.0.1:9090")
	return s.Start(ctx, Server{
		Name: Prometheus, Node: s.cfg.Lab.Cluster().Nodes[0].Name, Program: program,
		Args: []string{
			"--config.file=" + config, "--storage.tsdb.path=" + filepath.Join(dir, "data"),
			"--web.listen-address=" + page.String(), "--enable-feature=exemplar-storage", "--log.level=warn",
		},
		Page: page, Ready: "/-/ready",
	})
}

func (s *Stack) scrapeConfig(rules string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "global: {scrape_interval: %v, evaluation_interval: %v}\n", ScrapeEvery, ScrapeEvery)
	fmt.Fprintf(&b, "rule_files: [%q]\n", rules)
	fmt.Fprint(&b, "scrape_configs:\n- job_name: kptrace\n  honor_labels: true\n  static_configs:\n")
	for _, n := range s.cfg.Lab.Cluster().Nodes {
		fmt.Fprintf(&b, "  - targets: [%q]\n    labels: {instance: %q, cluster: lab}\n", netip.AddrPortFrom(n.Addr, MetricsPort), n.Name)
	}
	return b.String()
}

// Querier asks a Prometheus.
type Querier struct {
	Client *http.Client
	// URL is where its API is, "http://127.0.0.1:9090".
	URL string
}

// Prometheus returns a Querier of the one that StartPrometheus runs.
func (s *Stack) Prometheus() (*Querier, error) {
	client, err := s.Client(Prometheus)
	return &Querier{Client: client, URL: "http://" + Prometheus}, err
}

// Sample is one series of an answer.
type Sample struct {
	Labels map[string]string `json:"metric"`
	Value  float64
}

// Query evaluates an expression now.
func (q *Querier) Query(ctx context.Context, expr string) ([]Sample, error) {
	var data struct {
		Type   string          `json:"resultType"`
		Result json.RawMessage `json:"result"`
	}
	if err := q.ask(ctx, "/api/v1/query", url.Values{"query": {expr}}, &data); err != nil {
		return nil, fmt.Errorf("stack: %s: %w", expr, err)
	}
	type point [2]any
	switch data.Type {
	case "scalar":
		var p point
		if err := json.Unmarshal(data.Result, &p); err != nil {
			return nil, fmt.Errorf("stack: %s: %w", expr, err)
		}
		v, err := number(p)
		return []Sample{{Value: v}}, err
	case "vector":
		var list []struct {
			Metric map[string]string `json:"metric"`
			Value  point             `json:"value"`
		}
		if err := json.Unmarshal(data.Result, &list); err != nil {
			return nil, fmt.Errorf("stack: %s: %w", expr, err)
		}
		var samples []Sample
		for _, x := range list {
			v, err := number(x.Value)
			if err != nil {
				return nil, fmt.Errorf("stack: %s: %w", expr, err)
			}
			samples = append(samples, Sample{x.Metric, v})
		}
		return samples, nil
	}
	return nil, fmt.Errorf("stack: %s: unexpected answer of type %q", expr, data.Type)
}

func number(p [2]any) (float64, error) {
	text, ok := p[1].(string)
	if !ok {
		return 0, fmt.Errorf("value %v is no string", p[1])
	}
	return strconv.ParseFloat(text, 64)
}

// Sum adds up the values of an expression's series, 0 if there are none.
func (q *Querier) Sum(ctx context.Context, expr string) (float64, error) {
	samples, err := q.Query(ctx, expr)
	total := 0.0
	for _, x := range samples {
		if !math.IsNaN(x.Value) {
			total += x.Value
		}
	}
	return total, err
}

// ask gets data from Prometheus' API.
func (q *Querier) ask(ctx context.Context, path string, form url.Values, data any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, q.URL+path+"?"+form.Encode(), nil)
	if err != nil {
		return err
	}
	res, err := q.Client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answer := struct {
		Status, Error string
		Data          any
	}{Data: data}
	if err := json.NewDecoder(res.Body).Decode(&answer); err != nil {
		return fmt.Errorf("%s: %w", res.Status, err)
	}
	if answer.Status != "success" {
		return errors.New(answer.Error)
	}
	return nil
}

package dashboards

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/internal/exec"
)

// TestLayout: panels fill the 24 columns without overlapping, and say what
// they show.
func TestLayout(t *testing.T) {
	list, err := List()
	if err != nil || len(list) != 4 {
		t.Fatalf("%d dashboards, %v", len(list), err)
	}
	for _, d := range list {
		m, err := parse(d.JSON)
		if err != nil {
			t.Fatal(err)
		}
		if d.Panels < 10 || d.Title == "" || d.Description == "" || !strings.HasPrefix(d.UID, "kptrace-") {
			t.Errorf("%s: %d panels, title %q, uid %q", d.File, d.Panels, d.Title, d.UID)
		}
		taken := map[[2]int]string{}
		for _, p := range m.Panels {
			g := p.GridPos
			if g.X+g.W > 24 || g.W < 1 || g.H < 1 {
				t.Errorf("%s: %s: %+v leaves the grid", d.File, p.Title, g)
			}
			for x := g.X; x < g.X+g.W; x++ {
				for y := g.Y; y < g.Y+g.H; y++ {
					if other, ok := taken[[2]int{x, y}]; ok {
						t.Fatalf("%s: %s lies on %s", d.File, p.Title, other)
					}
					taken[[2]int{x, y}] = p.Title
				}
			}
			if p.Type != "row" && len(p.Targets) == 0 {
				t.Errorf("%s: %s asks nothing", d.File, p.Title)
			}
		}
		for _, want := range []string{"datasource", "cluster", "node"} {
			if !slices.ContainsFunc(m.Templating.List, func(v struct {
				Name string `json:"name"`
				Type string `json:"type"`
				Def  string `json:"definition"`
			}) bool {
				return v.Name == want
			}) {
				t.Errorf("%s: no variable %s", d.File, want)
			}
		}
	}
}

// notShown lists what no panel and no rule asks for, and why.
func notShown() map[string]string {
	return map[string]string{
		"kptrace_source_receive_buffer_bytes": "a setting",
		"kptrace_metrics_updates_total":       "the correlator's updates are shown",
		"kptrace_userspace_ports_free":        "only with --proxy-port-range",

		"kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds":   "kptrace_proxy_sync_lag_seconds says it better",
		"kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total": "always 0: there is no such mode",
		"kubeproxy_sync_proxy_rules_nftables_sync_failures_total":    "always 0: there is no such mode",
	}
}

// TestNames: what panels and rules ask for is served: it is in the tables of
// the pages that the exporters are held against. And what is served is shown.
func TestNames(t *testing.T) {
	known, families := map[string]bool{}, map[string]bool{}
	for _, page := range []string{"metrics.md", "otlp.md", "modes.md"} {
		docs, err := os.ReadFile("../docs/" + page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile("(?m)^\\| `((?:kptrace|kubeproxy)_\\w+)` \\| (\\w*)").FindAllStringSubmatch(string(docs), -1) {
			known[m[1]], families[m[1]] = true, true
			if m[2] == "histogram" || m[2] == "summary" {
				known[m[1]+"_bucket"], known[m[1]+"_sum"], known[m[1]+"_count"] = true, true, true
			}
		}
	}
	queries, err := Queries()
	if err != nil || len(queries) < 80 {
		t.Fatalf("%d queries, %v", len(queries), err)
	}
	asked := map[string]string{}
	name := regexp.MustCompile(`\b(kptrace|kubeproxy)_\w+`)
	for _, q := range queries {
		if strings.Contains(q.Substitute(nil, "5m"), "$") {
			t.Errorf("%s: a variable nobody fills: %s", q.Where, q.Substitute(nil, "5m"))
		}
		for _, n := range name.FindAllString(q.Expr, -1) {
			asked[n] = q.Where
		}
	}
	for line := range strings.Lines(string(Rules())) {
		if strings.Contains(line, "record:") {
			continue
		}
		for _, n := range name.FindAllString(regexp.MustCompile(`\w+:\w+:\w+`).ReplaceAllString(line, ""), -1) {
			asked[n] = "rules.yaml"
		}
	}
	if len(asked) < 50 {
		t.Errorf("only %d metrics are asked for", len(asked))
	}
	for n, where := range asked {
		if !known[n] {
			t.Errorf("%s: no metric %s", where, n)
		}
	}
	shown := func(family string) bool {
		for n := range asked {
			if n == family || known[n] && strings.HasPrefix(n, family+"_") && !families[n] {
				return true
			}
		}
		return false
	}
	for f := range families {
		switch why, left := notShown()[f]; {
		case shown(f) && left:
			t.Errorf("%s is shown, though %s", f, why)
		case !shown(f) && !left:
			t.Errorf("no panel and no rule asks for %s", f)
		}
	}
}

// TestRules has promtool check the rules, and judge each alert by series made
// up for it.
func TestRules(t *testing.T) {
	dir, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"check", "rules", "../rules.yaml"}, {"test", "rules", "rules_test.yaml"}} {
		r, err := exec.Run(t.Context(), exec.Spec{Path: "promtool", Args: args, Dir: dir})
		if err != nil {
			t.Errorf("promtool %v: %v\n%s%s", args, err, r.Stdout, r.Stderr)
		}
	}
	tests, err := os.ReadFile("testdata/rules_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^  - (?:alert|record): (\S+)`).FindAllStringSubmatch(string(Rules()), -1) {
		if !strings.Contains(string(tests), m[1]) && !strings.Contains(m[1], "picks") {
			t.Errorf("rules_test.yaml has no test of %s", m[1])
		}
	}
}

// TestExport: what is written is what is embedded, once plain and once for
// Grafana to provision itself from.
func TestExport(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	names, err := Export(dir, false)
	if err != nil || len(names) != 5 {
		t.Fatalf("%v, %v", names, err)
	}
	list, _ := List()
	for _, d := range list {
		text, err := os.ReadFile(filepath.Join(dir, d.File))
		if err != nil || string(text) != string(d.JSON) {
			t.Errorf("%s: %v", d.File, err)
		}
	}
	names, err = Export(dir, true)
	if err != nil || len(names) != 7 {
		t.Fatalf("%v, %v", names, err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "dashboards", "kptrace.yaml"))
	if err != nil || !strings.Contains(string(text), filepath.Join(dir, "dashboards", "kptrace")) {
		t.Errorf("%v\n%s", err, text)
	}
	if _, err := Export(filepath.Join(dir, RulesFile), false); err == nil {
		t.Error("a file was taken for a folder")
	}
}

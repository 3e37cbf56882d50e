// Package dashboards holds what people look at kptrace's metrics with: Grafana
// dashboards, and recording and alert rules for Prometheus. The dashboards are
// generated (dashboards/generate) and checked in; all of it is embedded.
package dashboards

import (
	"embed"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

//go:embed *.json rules.yaml
var files embed.FS

// RulesFile is the name under which Export writes the rules.
const RulesFile = "kptrace-rules.yaml"

// Dashboard is one Grafana dashboard.
type Dashboard struct {
	// File is its name when exported, UID its address in Grafana.
	File, UID   string
	Title       string
	Description string
	// Panels is how many it has, JSON the whole of it.
	Panels int
	JSON   []byte
}

// List returns the dashboards by file name.
func List() ([]Dashboard, error) {
	names, err := fs.Glob(files, "*.json")
	if err != nil {
		return nil, fmt.Errorf("dashboards: %w", err)
	}
	slices.Sort(names)
	var all []Dashboard
	for _, name := range names {
		text, err := files.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("dashboards: %w", err)
		}
		m, err := parse(text)
		if err != nil {
			return nil, fmt.Errorf("dashboards: %s: %w", name, err)
		}
		d := Dashboard{File: "kptrace-" + name, UID: m.UID, Title: m.Title, Description: m.Description, JSON: text}
		for _, p := range m.Panels {
			if p.Type != "row" {
				d.Panels++
			}
		}
		all = append(all, d)
	}
	return all, nil
}

// Rules returns the recording and alert rules, a rule file of Prometheus.
func Rules() []byte {
	text, err := files.ReadFile("rules.yaml")
	if err != nil {
		return nil // cannot happen: it is part of the binary
	}
	return text
}

// Export writes the dashboards and the rules to dir, which is made if absent,
// and returns the files' names. With provision, dir is laid out as a folder
// that Grafana provisions itself from; GF_PATHS_PROVISIONING.
func Export(dir string, provision bool) ([]string, error) {
	list, err := List()
	if err != nil {
		return nil, err
	}
	content := map[string][]byte{RulesFile: Rules()}
	folder := ""
	if provision {
		abs, err := filepath.Abs(dir)
		if err != nil {
			return nil, fmt.Errorf("dashboards: %w", err)
		}
		folder = filepath.Join("dashboards", "kptrace")
		content[filepath.Join("dashboards", "kptrace.yaml")] = []byte(strings.ReplaceAll(provider, "DIR", filepath.Join(abs, folder)))
		content[filepath.Join("datasources", "kptrace.yaml")] = []byte(sources)
	}
	for _, d := range list {
		content[filepath.Join(folder, d.File)] = d.JSON
	}
	var names []string
	for name, text := range content {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, fmt.Errorf("dashboards: %w", err)
		}
		if err := os.WriteFile(path, text, 0o644); err != nil {
			return nil, fmt.Errorf("dashboards: %w", err)
		}
		names = append(names, path)
	}
	slices.Sort(names)
	return names, nil
}

// provider has Grafana load the dashboards from a folder.
const provider = `apiVersion: 1
providers:
- name: kptrace
  folder: kptrace
  type: file
  allowUiUpdates: true
  options: {path: "DIR"}
`

// sources connects Grafana with servers on this machine. The exemplars of the
// latency panels lead to Jaeger.
const sources = `apiVersion: 1
datasources:
- name: Prometheus
  uid: kptrace-prometheus
  type: prometheus
  access: proxy
  url: http://127.0.0.1:9090
  jsonData:
    exemplarTraceIdDestinations: [{name: trace_id, datasourceUid: kptrace-jaeger}]
- name: Jaeger
  uid: kptrace-jaeger
  type: jaeger
  access: proxy
  url: http://127.0.0.1:16686
`

// model is a dashboard's JSON as far as it is looked at here.
type model struct {
	UID         string `json:"uid"`
	Title       string `json:"title"`
	Description string `json:"description"`
	Panels      []struct {
		Type    string `json:"type"`
		Title   string `json:"title"`
		Targets []struct {
			Expr  string `json:"expr"`
			RefID string `json:"refId"`
		} `json:"targets"`
		GridPos struct{ H, W, X, Y int } `json:"gridPos"`
	} `json:"panels"`
	Templating struct {
		List []struct {
			Name string `json:"name"`
			Type string `json:"type"`
			Def  string `json:"definition"`
		} `json:"list"`
	} `json:"templating"`
}

func parse(text []byte) (*model, error) {
	m := new(model)
	return m, json.Unmarshal(text, m)
}

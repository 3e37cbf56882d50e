// Command generate writes the dashboards beside package dashboards, made with
// Grafana's foundation SDK. make generate runs it; a test holds the files
// against what it would write.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

func main() {
	dir := "."
	if len(os.Args) == 2 {
		dir = os.Args[1]
	}
	if err := write(dir); err != nil {
		fmt.Fprintln(os.Stderr, "generate:", err)
		os.Exit(1)
	}
}

func write(dir string) error {
	files, err := boards()
	if err != nil {
		return err
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// boards renders all dashboards, by the names of their files.
func boards() (map[string][]byte, error) {
	files := map[string][]byte{}
	for name, build := range map[string]func() *board{
		"services.json": services, "service.json": service, "node.json": node, "health.json": health,
	} {
		d, err := build().Build()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		text, err := render(d)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		files[name] = text
	}
	return files, nil
}

// render makes the classic JSON, which every Grafana takes; the model's
// successor is for the newest alone.
func render(d dashboard.Dashboard) ([]byte, error) { //nolint:staticcheck // see above
	for i := range d.Panels {
		id := uint32(i + 1)
		if p := d.Panels[i].Panel; p != nil {
			p.Id = &id
		}
		if r := d.Panels[i].RowPanel; r != nil {
			r.Id = id
		}
	}
	text, err := json.MarshalIndent(d, "", "  ")
	return append(text, '\n'), err
}

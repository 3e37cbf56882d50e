package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

// TestGenerated: the files are what make generate would write, and nothing
// else lies beside them.
func TestGenerated(t *testing.T) {
	files, err := boards()
	if err != nil {
		t.Fatal(err)
	}
	have, err := filepath.Glob("../*.json")
	if err != nil || len(have) != len(files) {
		t.Errorf("%v, want %d files; %v", have, len(files), err)
	}
	for name, want := range files {
		got, err := os.ReadFile(filepath.Join("..", name))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what make generate writes: %v", name, err)
		}
	}
}

// TestStrict: Grafana's own model takes every field.
func TestStrict(t *testing.T) {
	plugins.RegisterDefaultPlugins()
	files, err := boards()
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		var d dashboard.Dashboard //nolint:staticcheck // see render
		if errs := strict(&d, text); len(errs) > 0 {
			t.Errorf("%s: %v", name, errs)
		}
		if err := d.Validate(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	var d dashboard.Dashboard //nolint:staticcheck // see render
	bad := bytes.Replace(files["node.json"], []byte(`"gridPos"`), []byte(`"gridPosition"`), 1)
	if errs := strict(&d, bad); len(errs) == 0 {
		t.Error("an unknown field was taken")
	}
}

// strict returns what the model does not take. Where all is well it returns an
// error that is a list of none.
func strict(d *dashboard.Dashboard, text []byte) (errs cog.BuildErrors) { //nolint:staticcheck // see render
	if err := d.UnmarshalJSONStrict(text); !errors.As(err, &errs) && err != nil {
		errs = cog.MakeBuildErrors("dashboard", err)
	}
	return errs
}

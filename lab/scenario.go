package lab

import (
	"embed"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

//go:embed scenario
var scenarios embed.FS

// DefaultScenario is the scenario a lab has if none is named.
const DefaultScenario = "demo"

// Scenarios lists the scenarios that come with kptrace.
func Scenarios() []string {
	entries, err := scenarios.ReadDir("scenario")
	if err != nil {
		return nil // cannot happen: it is part of the binary
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// WriteScenario writes a scenario's files to dir, which is made if absent. It
// overwrites nothing: a folder that holds manifests is an error.
func WriteScenario(name, dir string) error {
	if !slices.Contains(Scenarios(), name) {
		return fmt.Errorf("lab: no scenario %q: there are %v", name, Scenarios())
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("lab: writing the scenario: %w", err)
	}
	if HasManifests(dir) {
		return fmt.Errorf("lab: writing the scenario: %s holds manifests already: %w", dir, fs.ErrExist)
	}
	root := "scenario/" + name
	entries, err := scenarios.ReadDir(root)
	if err != nil {
		return fmt.Errorf("lab: reading the scenario: %w", err)
	}
	for _, e := range entries {
		b, err := scenarios.ReadFile(root + "/" + e.Name())
		if err != nil {
			return fmt.Errorf("lab: reading the scenario: %w", err)
		}
		if err := os.WriteFile(filepath.Join(dir, e.Name()), b, 0o644); err != nil {
			return fmt.Errorf("lab: writing the scenario: %w", err)
		}
	}
	return nil
}

// HasManifests reports whether a folder holds files that would be read.
func HasManifests(dir string) bool {
	for _, ext := range []string{"*.yaml", "*.yml", "*.json"} {
		if found, err := filepath.Glob(filepath.Join(dir, ext)); err == nil && len(found) > 0 {
			return true
		}
	}
	return false
}

package iptables

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/internal/exec"
)

// TestLacks asks the real kernel, which has all, and kernels that lack something:
// programs beside the real ones that refuse a match as those do.
func TestLacks(t *testing.T) {
	eachFlavour(t, func(t *testing.T, cfg Config) {
		cfg.LocalhostNodePorts = true
		lacks := func(t *testing.T, cfg Config, sysctls string, want ...string) {
			t.Helper()
			d := NewDual(cfg)
			d.v4.sysctls = sysctls
			got, err := d.Lacks(t.Context())
			if err != nil || (got == "") != (want == nil) {
				t.Errorf("lacks %q, %v; want %q", got, err, want)
			}
			for _, w := range want {
				if !strings.Contains(got, w) {
					t.Errorf("lacks %q, want %q in it", got, w)
				}
			}
		}
		lacks(t, cfg, "/proc/sys")
		if got := save(t, cfg); strings.Contains(got, "PROBE") {
			t.Errorf("it wrote rules where it looked:\n%s", got)
		}
		lacks(t, cfg, t.TempDir(), "route_localnet")
		cfg.LocalhostNodePorts = false
		lacks(t, cfg, t.TempDir())

		for _, tt := range []struct {
			without string
			want    []string
		}{
			{"statistic", []string{"the match statistic, by which", "no match statistic"}},
			{"recent", []string{"the match recent, which"}},
			{"statistic|recent", []string{"statistic", "recent"}},
			{"RETURN", nil}, // nothing works: no reason for another mode
		} {
			without := cfg
			without.Tools.Dir = lacking(t, cfg.Flavour, tt.without)
			lacks(t, without, "/proc/sys", tt.want...)
		}
	})
}

// lacking makes a folder with the restore program of a kernel without some matches.
func lacking(t *testing.T, flavour, matches string) string {
	t.Helper()
	name := "iptables-" + flavour + "-restore"
	real, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	script := `#!/bin/sh
text=$(cat)
line=$(printf '%s\n' "$text" | grep -nE -m 1 '` + matches + `')
if [ -n "$line" ]; then
	echo "` + name + `: line ${line%%:*} failed: no match ` + matches + `" >&2
	exit 2
fi
printf '%s\n' "$text" | exec ` + real + ` "$@"
`
	if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

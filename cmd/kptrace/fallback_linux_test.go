package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
)

// TestModeFallback runs on a node whose kernel has neither IPVS nor the match
// statistic, for which a program that refuses it stands beside the real one: mode
// ipvs ends up as userspace, serves, and says why everywhere.
func TestModeFallback(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.serve(1)
	w.write(map[string]string{"a.yaml": manifest("foo", 10, 8080, "", 1)})
	restore, err := exec.LookPath("iptables-nft-restore")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "iptables-nft-restore"), `#!/bin/sh
text=$(cat)
line=$(printf '%s\n' "$text" | grep -n -m 1 statistic)
if [ -n "$line" ]; then
	echo "iptables-nft-restore: line ${line%%:*} failed: no match statistic" >&2
	exit 2
fi
printf '%s\n' "$text" | exec `+restore+` "$@"
`)
	if err := os.Chmod(filepath.Join(dir, "iptables-nft-restore"), 0o755); err != nil {
		t.Fatal(err)
	}
	proxy := func(flags ...string) *child {
		args := append([]string{"-c", `PATH=$0:$PATH exec kptrace proxy "$@"`, dir,
			"--manifests", w.manifests, "--node", "node1", "--iptables-flavour", "nft"}, flags...)
		return w.start("sh", args...)
	}

	p := proxy("--mode=ipvs", "--metrics-bind-address=127.0.0.1:10249")
	w.synced(p)
	w.gets("http://127.0.0.1:10249/proxyMode", 200, "userspace")
	w.gets("http://127.0.0.1:10249/metrics", 200, `kptrace_proxy_mode_fallback{mode="userspace",wanted="ipvs"} 1`)
	w.gets("http://10.96.0.10/", 200)
	const why = "mode iptables cannot run either: the kernel lacks the match statistic"
	if status := w.must("status"); !strings.Contains(status, "fell back to userspace") || !strings.Contains(status, why) {
		t.Errorf("status does not say it:\n%s", status)
	}
	if !strings.Contains(p.err.String(), "falling back to the userspace mode") || !strings.Contains(p.err.String(), why) {
		t.Errorf("the log does not say it:\n%s", p.err)
	}
	if err := p.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	<-p.Done()

	p = proxy("--mode=iptables", "--mode-fallback=false")
	select {
	case <-p.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("--mode-fallback=false does not refuse")
	}
	if p.ExitCode() != 1 || !strings.Contains(p.err.String(), "mode iptables cannot run here: the kernel lacks the match statistic") {
		t.Errorf("refused with %d:\n%s", p.ExitCode(), p.err)
	}
}

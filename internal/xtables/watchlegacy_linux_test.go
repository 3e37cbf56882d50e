package xtables

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
)

// TestLegacyAside has the lock of iptables used before the tables were looked at:
// by ourselves for another family, which is nothing, and by others, which is a
// reason for doubt.
func TestLegacyAside(t *testing.T) {
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	lock := filepath.Join(t.TempDir(), "lock")
	writeLock := func() {
		if err := os.WriteFile(lock, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	writeLock()
	if _, err := exec.Run(t.Context(), exec.Spec{Path: "iptables-legacy-restore", Netns: ns.Fd(), Env: []string{"XTABLES_LOCKFILE=" + lock},
		Stdin: strings.NewReader("*nat\n:KUBE-SERVICES - [0:0]\nCOMMIT\n")}); err != nil {
		t.Fatal(err)
	}
	w, err := OpenWatch(WatchConfig{Flavour: Legacy, Netns: ns.Fd(), LockFile: lock, Tables: []string{"nat"}})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	w.Settle(0)
	w.side.(*legacyWatch).looked = false // as if the table were large
	w.Aside(writeLock)
	if got := w.Look(); got.Suspicion != Quiet {
		t.Errorf("after a use of our own: %+v", got)
	}
	w.Settle(0)
	w.side.(*legacyWatch).looked = false
	writeLock()
	w.Aside(writeLock)
	if got := w.Look(); got.Suspicion != Doubt {
		t.Errorf("after others used the lock, and then we: %+v", got)
	}
}

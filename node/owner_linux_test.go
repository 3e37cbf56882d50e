package node

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/kptrace/kptrace/internal/netns"
)

const acct = "net/netfilter/nf_conntrack_acct"

// fresh runs f in a network namespace of its own.
func fresh(t *testing.T, f func()) {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := ns.Do(func() error { f(); return nil }); err != nil {
		t.Fatal(err)
	}
	runtime.KeepAlive(ns)
}

func mustOwn(t *testing.T, dir string) *owner {
	t.Helper()
	o, err := own(dir)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func sysctl(t *testing.T, name string) string {
	t.Helper()
	v, err := readSysctl(name)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestOneOwner(t *testing.T) {
	dir := t.TempDir()
	fresh(t, func() {
		o := mustOwn(t, dir)
		if _, err := own(dir); !errors.Is(err, errOwned) {
			t.Errorf("a second owner got %v", err)
		}
		fresh(t, func() { mustOwn(t, dir).release() }) // elsewhere is free
		o.release()
		mustOwn(t, dir).release()
	})
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestSysctlsAreSetBack(t *testing.T) {
	dir := t.TempDir()
	fresh(t, func() {
		was := sysctl(t, acct)
		o := mustOwn(t, dir)
		if err := o.set(acct, "1"); err != nil {
			t.Fatal(err)
		}
		if c := o.changed(); was == "0" && (len(c) != 1 || c[0].Before != "0" || c[0].Now != "1") {
			t.Errorf("changed = %v", c)
		}
		if err := o.restore(); err != nil {
			t.Fatal(err)
		}
		if now := sysctl(t, acct); now != was {
			t.Errorf("acct is %s after restore, was %s", now, was)
		}
		o.release()
	})
}

func TestSysctlChangedByOthersStays(t *testing.T) {
	dir := t.TempDir()
	const name = "net/netfilter/nf_conntrack_tcp_timeout_time_wait"
	fresh(t, func() {
		o := mustOwn(t, dir)
		defer o.release()
		if err := o.set(name, "10"); err != nil {
			t.Fatal(err)
		}
		if err := writeSysctl(name, "55"); err != nil {
			t.Fatal(err)
		}
		if err := o.restore(); err != nil {
			t.Fatal(err)
		}
		if now := sysctl(t, name); now != "55" {
			t.Errorf("somebody else's 55 became %s", now)
		}
	})
}

// TestOwnerAfterDeath takes over from an owner that could not say goodbye.
func TestOwnerAfterDeath(t *testing.T) {
	dir := t.TempDir()
	const name = "net/netfilter/nf_conntrack_tcp_timeout_time_wait"
	fresh(t, func() {
		was := sysctl(t, name)
		dead := mustOwn(t, dir)
		if err := dead.set(name, "10"); err != nil {
			t.Fatal(err)
		}
		_ = dead.lock.Close() // as the kernel does for a killed process

		o := mustOwn(t, dir)
		if err := o.set(name, "20"); err != nil {
			t.Fatal(err)
		}
		if err := o.restore(); err != nil {
			t.Fatal(err)
		}
		o.release()
		if now := sysctl(t, name); now != was {
			t.Errorf("%s after restore, was %s before the first owner", now, was)
		}
	})
}

func TestDamagedStateIsSaid(t *testing.T) {
	dir := t.TempDir()
	fresh(t, func() {
		o := mustOwn(t, dir)
		path := o.path
		o.release()
		if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := own(dir); err == nil {
			t.Error("a damaged state file was taken for an empty one")
		}
	})
}

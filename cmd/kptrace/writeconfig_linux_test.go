package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/proxy/kube/config"
)

// TestWriteConfigDiskFull writes onto a disk that is full: what was there stays,
// and nothing else is left.
func TestWriteConfigDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	path, filler := filepath.Join(dir, "config.yaml"), filepath.Join(dir, "filler")
	if err := os.WriteFile(path, []byte("before\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filler, make([]byte, 1<<20), 0o644); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("filling the disk: %v", err)
	}
	err := writeConfig(path, config.Default())
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "config.yaml") {
		t.Errorf("error %v, want one that names the file and says that the disk is full", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "before\n" {
		t.Errorf("the file is now %q, %v", b, err)
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 2 {
		t.Errorf("%v, %v", list, err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if err := writeConfig(path, config.Default()); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o644 || info.Size() < 500 {
		t.Errorf("%v, %v", info, err)
	}
}

package lab

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestOccupy wants nothing left of a lab that ends, others' files left alone, and one
// lab at a time.
func TestOccupy(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "lab")
	fill := func() {
		for _, name := range []string{"node1.sock", "netns-1.json", "netns-1.lock", "manifests/a.yaml", "etc/hosts", "kube-proxy/node1.sock"} {
			path := filepath.Join(dir, name)
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, nil, 0o600)); err != nil {
				t.Fatal(err)
			}
		}
	}
	lock, err := occupy(dir)
	if err != nil {
		t.Fatal(err)
	}
	fill()
	if _, err := occupy(dir); !errors.Is(err, ErrRunning) {
		t.Errorf("a second lab: %v", err)
	}
	leave(dir, lock)
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		list, _ := os.ReadDir(dir)
		t.Errorf("%v is left", list)
	}
	if lock, err = occupy(dir); err != nil {
		t.Fatal(err)
	}
	fill()
	mine := filepath.Join(dir, "mine")
	if err := os.WriteFile(mine, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	leave(dir, lock)
	if list, err := os.ReadDir(dir); err != nil || len(list) != 1 || list[0].Name() != "mine" {
		t.Errorf("%v, %v; want the file that is not a lab's", list, err)
	}
}

package config

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

// ErrChanged says that the configuration file has other contents than at the
// start. The process is meant to end then, and to be started again with them.
var ErrChanged = errors.New("content of the proxy server's configuration file was updated")

// settle is how long after an event the file is read: editors and the kubelet
// write in several steps.
const settle = 200 * time.Millisecond

// Watch waits until the file holds something else than data, and returns an
// error in which errors.Is finds ErrChanged; or until ctx ends, and returns
// nil. It follows symbolic links as the kubelet moves them. A file that is gone
// has not changed: it may come back. Nor has one of which unusable says that nobody
// could start with it, such as one that a full disk left empty: a proxy at work is
// better than none.
func Watch(ctx context.Context, path string, data []byte, unusable func(now []byte) bool) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("proxy/kube/config: watching %s: %w", path, err)
	}
	defer w.Close()
	// The folder, because a file that is replaced takes its watch along; the
	// real file's folder too, which is where a link leads.
	dirs := []string{filepath.Dir(path)}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		dirs = append(dirs, filepath.Dir(real))
	}
	for _, dir := range dirs {
		if err := w.Add(dir); err != nil {
			return fmt.Errorf("proxy/kube/config: watching %s: %w", dir, err)
		}
	}
	look := time.NewTimer(0) // it may have changed since data was read
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.Events:
			look.Reset(settle)
		case err := <-w.Errors:
			return fmt.Errorf("proxy/kube/config: watching %s: %w", path, err)
		case <-look.C:
			if now, err := os.ReadFile(path); err == nil && !bytes.Equal(now, data) && !unusable(now) {
				return fmt.Errorf("%s: %w", path, ErrChanged)
			}
		}
	}
}

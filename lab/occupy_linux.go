package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// occupy makes the folder of a lab's sockets ours for as long as the returned
// file is open, and removes what a killed lab left in it. The kernel gives
// the lock back when we die, however we die.
func occupy(dir string) (*os.File, error) {
	if dir == "" {
		return nil, errors.New("lab: Config.SocketDir is empty")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("lab: making a place for sockets: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lab: taking the lock: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lab: %s: %w", dir, ErrRunning)
		}
		return nil, fmt.Errorf("lab: taking the lock: %w", err)
	}
	// A lab that ends removes its lock: what we hold may be what is gone.
	if held, err := lock.Stat(); err == nil {
		if there, err := os.Stat(lock.Name()); err != nil || !os.SameFile(held, there) {
			lock.Close()
			return nil, fmt.Errorf("lab: %s: %w", dir, ErrRunning)
		}
	}
	if err := sweep(dir); err != nil {
		lock.Close()
		return nil, fmt.Errorf("lab: removing what the last lab left: %w", err)
	}
	return lock, nil
}

// leave removes what a lab put into its folder, and the folder if nothing else is in
// it. The lock goes last.
func leave(dir string, lock *os.File) {
	if sweep(dir) == nil {
		_ = os.Remove(lock.Name())
	}
	lock.Close()
	_ = os.Remove(dir) // if it is empty
}

// sweep removes all but the lock.
func sweep(dir string) error {
	var failed []error
	for _, pattern := range leftovers() {
		stale, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			continue // dir has signs of a pattern in its name; sockets are replaced anyway
		}
		for _, path := range stale {
			failed = append(failed, os.RemoveAll(path))
		}
	}
	return errors.Join(failed...)
}

// besideDir is where proxies beside agents have their state.
const besideDir = "kube-proxy"

// leftovers are what a lab puts into its folder: sockets, its nodes' state
// (for their namespaces, which are gone), and the manifests of a scenario.
func leftovers() []string {
	return []string{"*.sock", filepath.Base(ControlPath("")), "netns-*", namesDir, manifestsDir, besideDir}
}

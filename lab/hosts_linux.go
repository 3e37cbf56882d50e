package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/netns"
)

// namesDir is where the files are that stand in for those below /etc.
const namesDir = "etc"

// nameServices lets programs in the lab find Services by name, by a file over
// /etc/hosts in the sandbox's own mount namespace. No name server can be
// reached from there, so /etc/resolv.conf names none, and other names fail at
// once. It returns how to undo it.
func (l *Lab) nameServices() (undo func(), err error) {
	undo = func() {}
	if !netns.Inside() {
		return undo, nil // those mounts are not ours
	}
	before, err := os.ReadFile("/etc/hosts")
	if err != nil {
		return undo, fmt.Errorf("lab: naming Services: %w", err)
	}
	dir := filepath.Join(l.cfg.SocketDir, namesDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return undo, fmt.Errorf("lab: naming Services: %w", err)
	}
	var done []string
	undo = func() {
		for _, path := range done {
			_ = unix.Unmount(path, unix.MNT_DETACH)
		}
	}
	for over, text := range map[string]string{
		"/etc/hosts":       hostsFile(string(before), l.cluster),
		"/etc/resolv.conf": "# There is no name server in the lab; see /etc/hosts.\n",
	} {
		if _, err := os.Stat(over); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		path := filepath.Join(dir, filepath.Base(over))
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return undo, fmt.Errorf("lab: naming Services: %w", err)
		}
		if err := unix.Mount(path, over, "", unix.MS_BIND, ""); err != nil {
			return undo, fmt.Errorf("lab: naming Services: mounting %s over %s: %w", path, over, err)
		}
		done = append(done, over)
	}
	return undo, nil
}

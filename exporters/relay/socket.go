package relay

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sort"
	"time"
)

// maxSocketPath is what fits in sockaddr_un with its NUL (linux/un.h).
const maxSocketPath = 107

// DefaultSocket is where a node listens and a client looks unless told
// otherwise: $KPTRACE_SOCKET; for root /run/kptrace/kptrace.sock; else
// $XDG_RUNTIME_DIR/kptrace/kptrace.sock, or /tmp/kptrace-UID/kptrace.sock where
// that variable is not set. Lab nodes are beside it as lab/NODE.sock.
func DefaultSocket() string {
	if path := os.Getenv("KPTRACE_SOCKET"); path != "" {
		return path
	}
	const name = "kptrace/kptrace.sock"
	if os.Geteuid() == 0 {
		return "/run/" + name
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, name)
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("kptrace-%d", os.Geteuid()), "kptrace.sock")
}

// LabSocket is where the lab's node of the given name listens.
func LabSocket(node string) string {
	return filepath.Join(filepath.Dir(DefaultSocket()), "lab", node+".sock")
}

// Discover lists the sockets on which a node listens now: the default one
// first, then those of a lab by name. If there is none, the error says what to
// do about it and is ErrNotRunning.
func Discover() ([]string, error) {
	lab, err := filepath.Glob(LabSocket("*"))
	if err != nil {
		return nil, fmt.Errorf("relay: %w", err)
	}
	sort.Strings(lab)
	var live []string
	var failed error
	for _, path := range append([]string{DefaultSocket()}, lab...) {
		if err := probe(path); err == nil {
			live = append(live, path)
		} else if failed == nil || errors.Is(err, fs.ErrPermission) {
			failed = err
		}
	}
	if len(live) == 0 {
		return nil, failed
	}
	return live, nil
}

// ErrNotRunning is the error of a Dial where nobody listens.
var ErrNotRunning = errors.New("no kptrace runs here: start `kptrace proxy`, `kptrace agent` or `kptrace lab up`")

// probe reports whether somebody listens at path.
func probe(path string) error {
	dialer := net.Dialer{Timeout: time.Second}
	conn, err := dialer.DialContext(context.Background(), "unix", path)
	switch {
	case err == nil:
		return conn.Close()
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("the socket %s belongs to another user: run this as that user, or with sudo (%w)", path, fs.ErrPermission)
	}
	return fmt.Errorf("%w (nobody listens at %s)", ErrNotRunning, path)
}

// listen makes the socket, and the folder around it, for the owner alone. A
// socket that a dead process left is removed; one on which somebody listens
// is an error that names them.
func listen(path string) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("relay: the socket path %s is %d bytes long, the kernel takes %d", path, len(path), maxSocketPath)
	}
	if err := ownFolder(filepath.Dir(path)); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode().Type() != fs.ModeSocket {
			return nil, fmt.Errorf("relay: %s exists and is no socket: remove it or choose another path", path)
		}
		dialer := net.Dialer{Timeout: time.Second}
		conn, err := dialer.DialContext(context.Background(), "unix", path)
		if err == nil {
			defer conn.Close()
			return nil, fmt.Errorf("relay: %s is in use by %s: stop it, or choose another path by --socket", path, peerName(conn))
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, fmt.Errorf("relay: somebody holds %s and does not answer: %w", path, err)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("relay: removing a dead process's socket: %w", err)
		}
	}
	l, err := new(net.ListenConfig).Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("relay: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("relay: %w", err)
	}
	return l, nil
}

// ownFolder makes a folder of our own. One that belongs to somebody else, or
// that others may write to, could hand our clients to a stranger.
func ownFolder(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("relay: %s is not a folder", dir)
	}
	if !ownedByUs(info) {
		return fmt.Errorf("relay: the folder %s belongs to another user: choose another path by --socket", dir)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("relay: others may write to the folder %s: chmod go-w it, or choose another path by --socket", dir)
	}
	return nil
}

package exec

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// DefaultGrace is how long Run lets a child finish after its context has
// ended, where Spec.Grace is zero.
const DefaultGrace = 5 * time.Second

// Flags is a set of CLONE_NEW* flags of clone(2), as golang.org/x/sys/unix
// names them.
type Flags uintptr

// IDMap maps Size user or group ids from Inside a new user namespace to
// Outside, in the terms of user_namespaces(7).
type IDMap struct {
	Inside, Outside, Size int
}

// Spec says what to run and how. The zero value of every field but Path is
// a sensible default.
type Spec struct {
	// Path is the program. A name without a slash is found with LookPath.
	Path string
	// Argv0 is what the program sees as its own name; empty means Path.
	Argv0 string
	// Args are the arguments after the program's name.
	Args []string
	// Env is appended to this process's environment; the last value of a
	// name wins.
	Env []string
	// Dir is the working directory; empty means ours.
	Dir string

	// Stdin is read by the child; nil means /dev/null. A *os.File is handed
	// over as it is, anything else is copied through a pipe.
	Stdin io.Reader
	// Stdout and Stderr receive what the child writes. Where they are nil,
	// Run captures into Result, and Start drops stdout and keeps the head
	// of stderr for the error.
	Stdout, Stderr io.Writer
	// ExtraFiles become descriptors 3, 4, … of the child.
	ExtraFiles []*os.File

	// Netns is a descriptor of the network namespace to run in; 0 means
	// ours. Entering needs CAP_SYS_ADMIN in the owner of that namespace.
	Netns int
	// NewNamespaces are made for the child (clone(2)). The first process of
	// a pid namespace must itself look whether we still live, for the kernel
	// cannot tell it of a death between clone and prctl; a sandbox's does.
	NewNamespaces Flags
	// UIDMap and GIDMap are written when NewNamespaces has CLONE_NEWUSER;
	// setgroups(2) is then denied in the child.
	UIDMap, GIDMap []IDMap

	// OwnGroup puts the child into a process group of its own, so that a
	// terminal's Ctrl-C reaches us but not the child.
	OwnGroup bool
	// Grace is how long Run lets the child go on after the context ended
	// before it is killed: a commit to the kernel is better finished than
	// torn. Zero means DefaultGrace, negative means kill at once.
	Grace time.Duration
}

// Result is what a finished child left.
type Result struct {
	// Stdout and Stderr are what the child wrote, where the Spec did not
	// send them elsewhere.
	Stdout, Stderr []byte
	// ExitCode is the child's, or -1 when a signal ended it.
	ExitCode int
}

// Error says which command failed and how.
type Error struct {
	// Path and Args are the command.
	Path string
	Args []string
	// Code is the exit code, or -1 when the child did not start or was
	// ended by a signal.
	Code int
	// Signal ended the child; nil otherwise.
	Signal os.Signal
	// Stderr is the head of what the child wrote to stderr, where we saw it.
	Stderr string
	// Err is the cause: an *os/exec.ExitError, a start error holding the
	// errno, or the context's error when the child was killed for it.
	Err error
}

// Error returns the command, what ended it, and the first lines of stderr.
func (e *Error) Error() string {
	cmd := filepath.Base(e.Path)
	if len(e.Args) > 0 {
		cmd += " " + strings.Join(e.Args, " ")
	}
	if r := []rune(cmd); len(r) > 200 {
		cmd = string(r[:200]) + "…"
	}
	msg := fmt.Sprintf("exec: %s: %v", cmd, e.Err)
	if head := firstLines(e.Stderr, 5); head != "" {
		msg += ": " + head
	}
	return msg
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// LookPath finds a program in PATH, then in the folders of the system
// administrator, which an ordinary user's PATH often lacks. A name with a
// slash is checked and returned as it is.
func LookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil || strings.Contains(name, "/") {
		return path, err
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	if errors.Is(err, exec.ErrNotFound) {
		return "", &Error{Path: name, Code: -1, Err: errNotFound}
	}
	return "", &Error{Path: name, Code: -1, Err: err}
}

// errNotFound wraps os/exec's own, so that errors.Is works with both it and
// fs.ErrNotExist.
var errNotFound = fmt.Errorf("not found in $PATH, /usr/sbin, /sbin or /usr/local/sbin: %w",
	errors.Join(exec.ErrNotFound, os.ErrNotExist))

func firstLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	if len(lines) > n {
		lines = append(lines[:n], "…")
	}
	return strings.Join(lines, "; ")
}

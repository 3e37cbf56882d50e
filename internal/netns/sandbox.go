package netns

import (
	"fmt"
	"io"
	"os"
	"time"
)

// Sandbox describes one run of our own binary in namespaces of its own.
type Sandbox struct {
	// Args are the arguments after the program's name, which is kept.
	Args []string
	// Env is appended to our environment; the last value of a name wins.
	Env []string
	// Dir is the working directory; empty means ours.
	Dir string
	// Stdin, Stdout and Stderr are the program's; nil means /dev/null.
	// The program runs in a process group of its own: reading from a
	// terminal would stop it.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// ExtraFiles become descriptors 3, 4, … of the program.
	ExtraFiles []*os.File
	// Forward lists signals that Reexec catches while the program runs and
	// hands on to it.
	Forward []os.Signal
	// Grace is how long the program may take to end after the context has
	// ended and it was sent SIGTERM; then all of it is killed. Zero means
	// five seconds, negative kills at once.
	Grace time.Duration
	// UserNS asks for a user namespace even where root needs none, to see
	// what an ordinary user would.
	UserNS bool
}

const defaultGrace = 5 * time.Second

// HostError says that the host forbids a sandbox, why, and what allows it.
type HostError struct {
	// Doing is the step that failed.
	Doing string
	// Cause is the setting or restriction that forbids it.
	Cause string
	// Fix is a command, or words, that allow it; empty when we know none.
	Fix string
	// Err is the kernel's answer; errors.Is finds the errno in it.
	Err error
}

// Error returns one line with step, errno, cause and fix.
func (e *HostError) Error() string {
	msg := fmt.Sprintf("netns: %s: %v", e.Doing, e.Err)
	if e.Cause != "" {
		msg += ": " + e.Cause
	}
	if e.Fix != "" {
		msg += "; to allow it: " + e.Fix
	}
	return msg
}

// Unwrap returns the kernel's answer.
func (e *HostError) Unwrap() error { return e.Err }

// Runner is what *testing.M is to Main.
type Runner interface {
	Run() int
}

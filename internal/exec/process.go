package exec

import (
	"os"
)

// Process is a running child.
type Process struct {
	process  *os.Process
	ownGroup bool

	done chan struct{} // closed when the child is reaped and its output copied
	code int           // valid after done
	err  error         // valid after done
}

// PID returns the child's process id, as seen from our pid namespace.
func (p *Process) PID() int { return p.process.Pid }

// Done is closed when the child has ended, has been reaped, and all it wrote
// has been copied.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait blocks until Done and returns nil if the child exited with 0, or an
// *Error. It may be called any number of times from any goroutine.
func (p *Process) Wait() error {
	<-p.done
	return p.err
}

// ExitCode waits for Done and returns the exit code, or -1 when a signal
// ended the child.
func (p *Process) ExitCode() int {
	<-p.done
	return p.code
}

// Signal sends sig to the child alone. It returns os.ErrProcessDone when the
// child has ended; no other process can be hit by a reused id (pidfd).
func (p *Process) Signal(sig os.Signal) error { return p.process.Signal(sig) }

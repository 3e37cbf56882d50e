package exec

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"
)

// Run runs a short command to its end and returns what it wrote.
//
// When ctx ends first, the child may still finish within Spec.Grace: the
// outcome is then the child's own, with a nil error if it succeeded, for what
// it did is done. After that it is killed, its group with it if it has its
// own, and the error wraps the cause of ctx. A ctx that has ended before Run
// starts nothing.
//
// A child that fails gives an *Error and the Result besides.
func Run(ctx context.Context, s Spec) (Result, error) {
	var stdout, stderr bytes.Buffer
	if s.Stdout == nil {
		s.Stdout = &stdout
	}
	if s.Stderr == nil {
		s.Stderr = &stderr
	}
	if ctx.Err() != nil {
		return Result{ExitCode: -1}, &Error{Path: s.Path, Args: s.Args, Code: -1,
			Err: fmt.Errorf("not started: %w", context.Cause(ctx))}
	}
	p, err := Start(s)
	if err != nil {
		return Result{ExitCode: -1}, err
	}
	var killed error
	select {
	case <-p.Done():
	case <-ctx.Done():
		if !p.endsWithin(s.grace()) {
			killed = context.Cause(ctx)
			_ = p.Kill() // it may have just ended
		}
	}
	err = p.Wait()
	if failed := (*Error)(nil); killed != nil && errors.As(err, &failed) {
		failed.Err = fmt.Errorf("%w: %w", failed.Err, killed)
	}
	return Result{Stdout: stdout.Bytes(), Stderr: stderr.Bytes(), ExitCode: p.code}, err
}

func (s *Spec) grace() time.Duration {
	if s.Grace == 0 {
		return DefaultGrace
	}
	return s.Grace
}

func (p *Process) endsWithin(d time.Duration) bool {
	if d < 0 {
		d = 0
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-p.done:
		return true
	case <-timer.C:
		return false
	}
}

//go:build !linux

package exec

import (
	"errors"
	"fmt"
)

// Start needs Linux: elsewhere no child can be bound to our life.
func Start(s Spec) (*Process, error) {
	return nil, &Error{Path: s.Path, Args: s.Args, Code: -1,
		Err: fmt.Errorf("starting programs needs Linux: %w", errors.ErrUnsupported)}
}

// Kill kills the child.
func (p *Process) Kill() error { return p.process.Kill() }

//go:build !linux

package drop

import (
	"context"
	"errors"
	"fmt"

	"github.com/kptrace/kptrace/trace"
)

func reasonNames() map[uint32]string { return nil }

// Run fails: only Linux has these tracepoints.
func (s *Source) Run(context.Context, func(), func(trace.Frame)) error {
	return fmt.Errorf("drop: only Linux has BPF: %w", errors.ErrUnsupported)
}

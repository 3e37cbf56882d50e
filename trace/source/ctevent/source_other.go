//go:build !linux

package ctevent

import (
	"context"
	"errors"
	"fmt"

	"github.com/kptrace/kptrace/trace"
)

// Run fails: only Linux has these events.
func (s *Source) Run(context.Context, func(), func(trace.Frame)) error {
	return fmt.Errorf("ctevent: only Linux has conntrack events: %w", errors.ErrUnsupported)
}

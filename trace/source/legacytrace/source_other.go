//go:build !linux

package legacytrace

import (
	"context"
	"errors"
	"fmt"

	"github.com/kptrace/kptrace/trace"
)

// Run fails: only Linux has iptables.
func (s *Source) Run(context.Context, func(), func(trace.Frame)) error {
	return fmt.Errorf("legacytrace: only Linux has iptables: %w", errors.ErrUnsupported)
}

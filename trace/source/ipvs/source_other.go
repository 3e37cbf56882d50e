//go:build !linux

package ipvs

import (
	"context"
	"errors"
	"fmt"

	"github.com/kptrace/kptrace/trace"
)

// Run fails: IPVS is part of Linux.
func (s *Source) Run(context.Context, func(), func(trace.Frame)) error {
	return fmt.Errorf("ipvs: only Linux has IPVS: %w", errors.ErrUnsupported)
}

//go:build !linux

package nftrace

import (
	"context"
	"errors"
	"fmt"

	"github.com/kptrace/kptrace/trace"
)

// Run fails: only Linux has nf_tables.
func (s *Source) Run(context.Context, func(), func(trace.Frame)) error {
	return fmt.Errorf("nftrace: only Linux has nf_tables: %w", errors.ErrUnsupported)
}

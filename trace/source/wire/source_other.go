//go:build !linux

package wire

import (
	"context"
	"errors"
	"fmt"

	"github.com/kptrace/kptrace/trace"
)

// Run fails: only Linux has AF_PACKET.
func (s *Source) Run(context.Context, func(), func(trace.Frame)) error {
	return fmt.Errorf("wire: only Linux has AF_PACKET: %w", errors.ErrUnsupported)
}

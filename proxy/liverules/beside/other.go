//go:build !linux

package beside

import (
	"context"
	"errors"
	"fmt"

	"github.com/kptrace/kptrace/proxy"
)

var errOS = fmt.Errorf("proxy/beside: this needs Linux: %w", errors.ErrUnsupported)

// Apply fails: it needs Linux.
func (b *Backend) Apply(context.Context, proxy.Program) (proxy.Report, error) {
	return proxy.Report{}, errOS
}

// Cleanup fails: it needs Linux.
func (b *Backend) Cleanup(context.Context) error { return errOS }

// Follow fails: it needs Linux.
func (b *Backend) Follow(context.Context, func()) error { return errOS }

func hasNFTables() bool { return false }

func elsewhere() string { return "" }

//go:build !linux

package load

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
)

var errLinux = fmt.Errorf("load: needs Linux: %w", errors.ErrUnsupported)

// Run fails: it needs Linux.
func Run(context.Context, Config) (Result, error) { return Result{}, errLinux }

// Serve fails: it needs Linux.
func Serve(context.Context, netip.AddrPort, func()) error { return errLinux }

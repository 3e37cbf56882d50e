//go:build !linux

package nflog

import (
	"context"
	"errors"
	"fmt"

	"github.com/kptrace/kptrace/trace"
)

var errLinux = fmt.Errorf("nflog: only Linux has NFLOG: %w", errors.ErrUnsupported)

// Run fails: only Linux has NFLOG.
func (s *Source) Run(context.Context, func(), func(trace.Frame)) error { return errLinux }

// Tap fails like Run.
func Tap(context.Context, TapConfig, func(), func(TapPacket)) error { return errLinux }

// Probe fails like Run.
func Probe(context.Context, uint16) error { return errLinux }

//go:build !linux

package umlguest

import (
	"context"
	"errors"
	"fmt"
)

var errLinux = fmt.Errorf("umlguest: user-mode Linux needs Linux: %w", errors.ErrUnsupported)

// Init does nothing: there is no guest.
func Init() {}

// Inside reports false: there is no guest.
func Inside() bool { return false }

// Native reports false: IPVS is part of Linux.
func Native() bool { return false }

// Available fails: user-mode Linux needs Linux.
func Available() error { return errLinux }

// Run fails: user-mode Linux needs Linux.
func Run(context.Context, Spec) (int, error) { return -1, errLinux }

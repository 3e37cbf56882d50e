//go:build !linux

package nfnl

import (
	"errors"
	"fmt"
)

// EnsureCounter needs Linux.
func EnsureCounter(name string) error { return noCounter(name) }

// DeleteCounter needs Linux.
func DeleteCounter(name string) error { return noCounter(name) }

// Counter needs Linux.
func Counter(name string) (packets uint64, err error) { return 0, noCounter(name) }

func noCounter(name string) error {
	return fmt.Errorf("nfnl: counter %s: %w", name, errors.ErrUnsupported)
}

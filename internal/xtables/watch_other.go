//go:build !linux

package xtables

import (
	"errors"
	"fmt"
)

// Watch tells when others write to tables; there are none here.
type Watch struct{}

// OpenWatch fails: only Linux has netfilter.
func OpenWatch(WatchConfig) (*Watch, error) {
	return nil, fmt.Errorf("xtables: watching tables: %w", errors.ErrUnsupported)
}

// Close does nothing.
func (*Watch) Close() error { return nil }

// Pause does nothing.
func (*Watch) Pause(bool) {}

// Settle does nothing.
func (*Watch) Settle(int) {}

// Look sees nothing.
func (*Watch) Look() Sight { return Sight{} }

// Aside runs f.
func (*Watch) Aside(f func()) { f() }

//go:build !linux

package features

import (
	"context"
	"errors"
	"fmt"
)

// Probe returns nothing: all of it is Linux.
func Probe(context.Context) []Feature { return nil }

// ProbeOnly reports the named features as absent: all of it is Linux.
func ProbeOnly(_ context.Context, names ...string) []Feature {
	err := fmt.Errorf("needs Linux: %w", errors.ErrUnsupported)
	var all []Feature
	for _, name := range names {
		all = append(all, Feature{Name: name, Detail: err.Error()})
	}
	return all
}

// Unavailable returns nothing: all of it is Linux.
func Unavailable(error) []Feature { return nil }

//go:build !linux

package dataplane

import "errors"

// Look finds nothing: this is not Linux.
func Look() []Sign { return nil }

// Flowtables fails: this is not Linux.
func Flowtables() ([]string, error) { return nil, errors.ErrUnsupported }

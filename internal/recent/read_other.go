//go:build !linux

package recent

import "errors"

// Read fails: it needs Linux.
func Read(string) ([]Entry, error) { return nil, errors.ErrUnsupported }

//go:build !linux

package conntrack

import (
	"context"
	"errors"
	"fmt"
)

// Conn asks the kernel about entries. It exists on Linux only.
type Conn struct{}

var errLinux = fmt.Errorf("conntrack: only Linux has this table: %w", errors.ErrUnsupported)

// Open fails: only Linux has a conntrack table.
func Open(Config) (*Conn, error) { return nil, errLinux }

// Close fails like Open.
func (*Conn) Close() error { return errLinux }

// Dump fails like Open.
func (*Conn) Dump(context.Context, func(Flow) error) error { return errLinux }

// Get fails like Open.
func (*Conn) Get(Tuple) (Flow, error) { return Flow{}, errLinux }

// Delete fails like Open.
func (*Conn) Delete(Flow) error { return errLinux }

// Stats fails like Open.
func (*Conn) Stats() (Stats, error) { return Stats{}, errLinux }

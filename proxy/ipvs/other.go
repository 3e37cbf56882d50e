//go:build !linux

package ipvs

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/kptrace/kptrace/proxy"
)

var errLinux = fmt.Errorf("proxy/ipvs: IPVS is a part of Linux: %w", errors.ErrUnsupported)

// Apply needs Linux.
func (b *Backend) Apply(context.Context, proxy.Program) (proxy.Report, error) {
	return proxy.Report{}, errLinux
}

// Preflight needs Linux.
func (b *Backend) Preflight(context.Context) (variant, reason string, err error) {
	return "", "", errLinux
}

// Cleanup needs Linux.
func (b *Backend) Cleanup(context.Context) error { return errLinux }

// Watch needs Linux.
func (b *Backend) Watch(context.Context, func(proxy.Drift)) error { return errLinux }

// LocalAddrs returns the addresses of all interfaces.
func LocalAddrs() []netip.Addr { return proxy.InterfaceAddrs() }

// Present needs Linux.
func Present() bool { return false }

// Leftovers needs Linux.
type Leftovers struct{}

// NewLeftovers returns Leftovers that find nothing.
func NewLeftovers(Config) *Leftovers { return &Leftovers{} }

// Cleanup finds nothing.
func (*Leftovers) Cleanup(context.Context) error { return nil }

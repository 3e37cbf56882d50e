//go:build !linux

package node

import (
	"context"
	"errors"
	"fmt"

	"github.com/kptrace/kptrace/proxy"
)

var errLinux = fmt.Errorf("node: only Linux has netfilter: %w", errors.ErrUnsupported)

// Run fails: only Linux has netfilter.
func Run(context.Context, Config) error { return errLinux }

// Init fails: only Linux has netfilter.
func Init(Config) error { return errLinux }

// Cleanup fails: only Linux has netfilter.
func Cleanup(context.Context, proxy.Backend, string) error { return errLinux }

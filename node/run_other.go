//go:build !linux

package node

import (
	"context"
	"errors"
	"fmt"

	"github.com/kptrace/kptrace/trace/bundle"
	"github.com/kptrace/kptrace/trace/check"
)

var errLinux = fmt.Errorf("node: only Linux has netfilter: %w", errors.ErrUnsupported)

// Run fails: only Linux has netfilter.
func Run(context.Context, Config) error { return errLinux }

// Inspect fails: only Linux has netfilter.
func Inspect(context.Context) (*check.State, []string, error) { return nil, nil, errLinux }

// Collect finds nothing: only Linux has netfilter.
func Collect(context.Context) []bundle.File {
	return []bundle.File{{Name: bundle.RulesDir, Why: errLinux.Error()}}
}

// Init fails: only Linux has netfilter.
func Init(Config) error { return errLinux }

// Cleanup fails: only Linux has netfilter.
func Cleanup(context.Context, Cleaner, string) error { return errLinux }

// Beside fails: it needs Linux.
func Beside(string) (bool, error) {
	return false, errors.ErrUnsupported
}

//go:build !linux

package netns

import (
	"context"
	"errors"
	"fmt"
	"os"
)

var errLinux = fmt.Errorf("netns: network namespaces need Linux: %w", errors.ErrUnsupported)

// NS is a network namespace; there are none here.
type NS struct{}

// New fails: network namespaces need Linux.
func New() (*NS, error) { return nil, errLinux }

// Current fails: network namespaces need Linux.
func Current() (*NS, error) { return nil, errLinux }

// Open fails: network namespaces need Linux.
func Open(string) (*NS, error) { return nil, errLinux }

// Fd returns -1.
func (*NS) Fd() int { return -1 }

// ID returns 0.
func (*NS) ID() uint64 { return 0 }

// String returns a placeholder.
func (*NS) String() string { return "net:[]" }

// Close does nothing.
func (*NS) Close() error { return nil }

// Do fails: network namespaces need Linux.
func (*NS) Do(func() error) error { return errLinux }

// Sysctl fails: network namespaces need Linux.
func (*NS) Sysctl(string) (string, error) { return "", errLinux }

// SetSysctl fails: network namespaces need Linux.
func (*NS) SetSysctl(string, string) error { return errLinux }

// Explain wraps err: there is nothing to allow here.
func Explain(doing string, err error, _ bool) *HostError { return &HostError{Doing: doing, Err: err} }

// Reexec fails: namespaces need Linux.
func Reexec(context.Context, Sandbox) (int, error) { return -1, errLinux }

// Init does nothing: there is no sandbox.
func Init() {}

// Inside reports false: there is no sandbox.
func Inside() bool { return false }

// Rootless reports false: there is no user namespace.
func Rootless() bool { return false }

// Main fails the tests: they need Linux.
func Main(Runner) {
	fmt.Fprintln(os.Stderr, errLinux)
	os.Exit(1)
}

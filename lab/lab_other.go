//go:build !linux

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

var errLinux = fmt.Errorf("lab: a lab needs Linux: %w", errors.ErrUnsupported)

// Lab needs Linux.
type Lab struct{}

// RunPod fails: it needs Linux.
func RunPod() error { return errLinux }

// Start fails: a lab needs Linux.
func Start(context.Context, Config) (*Lab, error) { return nil, errLinux }

// StartNode fails: a lab needs Linux.
func (*Lab) StartNode(string) error { return errLinux }

// WaitReady fails: a lab needs Linux.
func (*Lab) WaitReady(context.Context) error { return errLinux }

// StartTraffic fails: a lab needs Linux.
func (*Lab) StartTraffic(context.Context) error { return errLinux }

// StopTraffic fails: a lab needs Linux.
func (*Lab) StopTraffic(context.Context) error { return errLinux }

// ServeControl fails: a lab needs Linux.
func (*Lab) ServeControl(context.Context, func(), func()) error { return errLinux }

// Follow fails: a lab needs Linux.
func (*Lab) Follow(context.Context, func(), func(trace.Message) error) error { return errLinux }

// Exec fails: a lab needs Linux.
func (*Lab) Exec(string, exec.Spec) (*exec.Process, error) { return nil, errLinux }

// Do fails: a lab needs Linux.
func (*Lab) Do(string, func() error) error { return errLinux }

// Fault fails: a lab needs Linux.
func (*Lab) Fault(context.Context, string, string, time.Duration) error { return errLinux }

// Incident fails: a lab needs Linux.
func (*Lab) Incident(context.Context, int) error { return errLinux }

// RunIncident fails: a lab needs Linux.
func (*Lab) RunIncident(context.Context, int) error { return errLinux }

// Heal fails: a lab needs Linux.
func (*Lab) Heal(context.Context) error { return errLinux }

// Happened returns 0.
func (*Lab) Happened() int { return 0 }

// Faults returns nothing.
func (*Lab) Faults(string) []string { return nil }

// Targets returns nothing.
func (*Lab) Targets() []string { return nil }

// Cluster returns an empty one.
func (*Lab) Cluster() *Cluster { return &Cluster{} }

// Problems returns nothing.
func (*Lab) Problems() []proxy.Problem { return nil }

// NodeSocket returns nothing.
func (*Lab) NodeSocket(string) string { return "" }

// Dir returns nothing.
func (*Lab) Dir() string { return "" }

// Ended returns a channel on which nothing comes.
func (*Lab) Ended() <-chan NodeEnd { return nil }

// Close does nothing.
func (*Lab) Close() {}

// Control needs Linux.
type Control struct{}

// DialControl fails: there is no lab.
func DialControl(context.Context, string) (*Control, error) { return nil, errLinux }

// Close does nothing.
func (*Control) Close() error { return nil }

// Status fails: there is no lab.
func (*Control) Status() (*Status, error) { return nil, errLinux }

// Fault fails: there is no lab.
func (*Control) Fault(string, string, time.Duration) error { return errLinux }

// Happened fails: there is no lab.
func (*Control) Happened() (int, proxy.Mode, error) { return 0, "", errLinux }

// Incident fails: there is no lab.
func (*Control) Incident(int) error { return errLinux }

// Heal fails: there is no lab.
func (*Control) Heal() error { return errLinux }

// Down fails: there is no lab.
func (*Control) Down() error { return errLinux }

// Exec fails: there is no lab.
func (*Control) Exec(context.Context, string, []string, [3]*os.File) (int, error) {
	return -1, errLinux
}

// Compare fails: only Linux has network namespaces.
func Compare(context.Context, CompareConfig, Case) (ModeCase, error) { return ModeCase{}, errLinux }

// CanCountSystemCalls fails: it needs Linux.
func CanCountSystemCalls() error { return errLinux }

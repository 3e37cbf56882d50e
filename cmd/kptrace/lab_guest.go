package main

import (
	"context"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/umlguest"
	"github.com/kptrace/kptrace/lab"
	"github.com/kptrace/kptrace/proxy"
)

// guestStartTime is how long the nodes of a lab may take in a guest, which has
// one CPU and slow system calls.
const guestStartTime = 4 * labStartTime

// wantsGuest reports whether a lab has to run in a kernel of its own.
func (f *labFlags) wantsGuest() bool {
	return !umlguest.Inside() && (f.guest || f.mode == string(proxy.IPVS) && !umlguest.Native())
}

// refuseGuest is for the commands that cannot work with a guest.
func (f *labFlags) refuseGuest(cmd *cobra.Command) error {
	if !f.wantsGuest() {
		return nil
	}
	why := "this kernel has no IPVS, and"
	fix := ", or give this kernel IPVS: sudo modprobe ip_vs"
	if f.guest {
		why, fix = "with --guest", ""
	}
	return usageErr(fmt.Errorf("%s: %s a lab in a guest kernel cannot be reached from outside: follow, exec and fault need a Unix socket, and two kernels share none; use kptrace lab run%s",
		cmd.CommandPath(), why, fix))
}

// inLab calls run in a sandbox, of this kernel or of a guest, and says which if
// it is not plain. Outside of it this program runs again, inside, with the
// same arguments.
func (f *labFlags) inLab(cmd *cobra.Command, run func(ctx context.Context) error) error {
	if !f.wantsGuest() {
		if f.mode == string(proxy.IPVS) && !netns.Inside() && !umlguest.Inside() {
			fmt.Fprintln(cmd.ErrOrStderr(), "kernel: this one, which has IPVS")
		}
		return inSandbox(cmd, run)
	}
	if err := umlguest.Available(); err != nil {
		return fmt.Errorf("this kernel has no IPVS (try: sudo modprobe ip_vs), and no other can be started: %w", err)
	}
	start := time.Now()
	code, err := umlguest.Run(cmd.Context(), umlguest.Spec{
		Args: os.Args[1:],
		// The sockets are the guest's own.
		Env:    []string{"KPTRACE_SOCKET=/run/kptrace/kptrace.sock"},
		Stdout: cmd.OutOrStdout(), Stderr: cmd.ErrOrStderr(),
		Forward: []os.Signal{syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT},
		Booted: func(i umlguest.Info) {
			why := "this one has no IPVS"
			if f.guest {
				why = "as --guest asks"
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "kernel: a guest, user-mode Linux %s with %d CPU, up after %.1f s (%s)\n",
				i.Release, i.CPUs, time.Since(start).Seconds(), why)
			for name, err := range i.Missing {
				fmt.Fprintf(cmd.ErrOrStderr(), "kernel: module %s is missing: %s\n", name, err)
			}
		},
	})
	if err != nil {
		return err
	}
	if code != 0 {
		return &exitCodeError{code: code}
	}
	return nil
}

// inSandbox runs f in a sandbox of this kernel. Outside of one it runs this
// program again, inside, with the same arguments.
func inSandbox(cmd *cobra.Command, f func(ctx context.Context) error) error {
	if netns.Inside() {
		return f(cmd.Context())
	}
	code, err := netns.Reexec(cmd.Context(), netns.Sandbox{
		Args: os.Args[1:],
		// Inside, everybody is uid 0: say where our sockets are.
		Env:     []string{"KPTRACE_SOCKET=" + relay.DefaultSocket()},
		Stdout:  cmd.OutOrStdout(),
		Stderr:  cmd.ErrOrStderr(),
		Forward: []os.Signal{syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT},
	})
	if err != nil {
		return err
	}
	if code != 0 {
		return &exitCodeError{code: code}
	}
	return nil
}

// defaultScenario is what a lab shows if nobody chooses.
func (f *labFlags) defaultScenario() string {
	if f.mode == string(proxy.IPVS) {
		return "schedulers"
	}
	return lab.DefaultScenario
}

// startPatience is how long the nodes of a lab may take to be ready.
func startPatience() time.Duration {
	if umlguest.Inside() {
		return guestStartTime
	}
	return labStartTime
}

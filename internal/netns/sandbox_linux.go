package netns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/kptrace/kptrace/internal/exec"
	"golang.org/x/sys/unix"
)

// marker tells a process of ours which part it plays in a sandbox: "init:N"
// the init with N extra files, "inside" the program.
const marker = "KPTRACE_SANDBOX"

const sandboxNamespaces = unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWNS

// Reexec runs our own binary in a Sandbox and returns its exit code, 128+N if
// signal N ended it. When ctx ends the program is sent SIGTERM, and all of
// the sandbox is killed after Sandbox.Grace; the error then wraps the cause.
// A sandbox that the host forbids gives a *HostError.
//
// When this process dies, however, the sandbox dies with it.
func Reexec(ctx context.Context, s Sandbox) (int, error) {
	status, child, err := os.Pipe()
	if err != nil {
		return -1, fmt.Errorf("netns: making a pipe: %w", err)
	}
	defer status.Close()
	defer child.Close()

	relay := make(chan os.Signal, 8)
	if len(s.Forward) > 0 {
		signal.Notify(relay, s.Forward...)
		defer signal.Stop(relay)
	}
	userNS := s.UserNS || !privileged()
	init, err := exec.Start(s.spec(child, userNS))
	if err != nil {
		return -1, startError(err, userNS)
	}
	child.Close()
	failed := make(chan error, 1)
	go func() { failed <- setupError(status, userNS) }()

	killed := s.attend(ctx, init, relay)
	waited := init.Wait()
	if err := <-failed; err != nil {
		return -1, err
	}
	if killed != nil {
		return init.ExitCode(), fmt.Errorf("netns: sandbox killed: %w", killed)
	}
	if e := (*exec.Error)(nil); errors.As(waited, &e) && e.Signal != nil {
		return -1, fmt.Errorf("netns: sandbox: %w", waited)
	}
	return init.ExitCode(), nil
}

func (s *Sandbox) spec(status *os.File, userNS bool) exec.Spec {
	spec := exec.Spec{
		Path:  "/proc/self/exe",
		Argv0: os.Args[0],
		Args:  s.Args,
		Env:   append(append([]string{}, s.Env...), fmt.Sprintf("%s=init:%d", marker, len(s.ExtraFiles))),
		Dir:   s.Dir,
		Stdin: s.Stdin, Stdout: s.Stdout, Stderr: s.Stderr,
		ExtraFiles:    append(append([]*os.File{}, s.ExtraFiles...), status),
		NewNamespaces: sandboxNamespaces,
		OwnGroup:      true,
	}
	if userNS {
		spec.NewNamespaces |= unix.CLONE_NEWUSER
		spec.UIDMap = []exec.IDMap{{Inside: 0, Outside: os.Geteuid(), Size: 1}}
		spec.GIDMap = []exec.IDMap{{Inside: 0, Outside: os.Getegid(), Size: 1}}
	}
	return spec
}

// attend waits for init to end, relays signals, and ends it after ctx. It
// returns why it had to kill.
func (s *Sandbox) attend(ctx context.Context, init *exec.Process, relay <-chan os.Signal) error {
	grace := s.Grace
	if grace == 0 {
		grace = defaultGrace
	}
	cancelled := ctx.Done()
	var deadline <-chan struct{}
	for {
		select {
		case <-init.Done():
			return nil
		case sig := <-relay:
			_ = init.Signal(sig) // it may have just ended
		case <-cancelled:
			cancelled = nil
			_ = init.Signal(unix.SIGTERM)
			timeout, stop := context.WithTimeout(context.WithoutCancel(ctx), grace)
			defer stop()
			deadline = timeout.Done()
		case <-deadline:
			// Killing pid 1 kills all of its pid namespace.
			return errors.Join(context.Cause(ctx), init.Kill())
		}
	}
}

// privileged reports whether we can make namespaces and mounts as we are: uid
// 0 with CAP_SYS_ADMIN. Root of a container that took it away cannot.
func privileged() bool {
	return os.Geteuid() == 0 && hasCap(unix.CAP_SYS_ADMIN) && hasCap(unix.CAP_NET_ADMIN)
}

func hasCap(c int) bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	return data[c/32].Effective&(1<<(c%32)) != 0
}

func startError(err error, userNS bool) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		if e := diagnose(doClone, errno, userNS, readSysctl); e.Cause != "" {
			return e
		}
	}
	return fmt.Errorf("netns: starting the sandbox: %w", err)
}

// setupError reads what init says about setting up: nothing, or "step\nerrno
// number\ntext".
func setupError(status io.Reader, userNS bool) error {
	b, err := io.ReadAll(status)
	if err != nil || len(b) == 0 {
		return err
	}
	step, rest, _ := strings.Cut(string(b), "\n")
	num, text, _ := strings.Cut(rest, "\n")
	var errno int
	if _, err := fmt.Sscan(num, &errno); err == nil && errno != 0 {
		return diagnose(step, syscall.Errno(errno), userNS, readSysctl)
	}
	return fmt.Errorf("netns: %s: %s", step, text)
}

// Inside reports whether this process is the program of a sandbox. Its own
// children are not: they may make a sandbox of their own.
func Inside() bool {
	return os.Getenv(marker) == "inside" && os.Getppid() == 1
}

// Rootless reports whether this process is in a user namespace that is not
// the whole machine's. There the kernel refuses SO_RCVBUFFORCE and
// SO_SNDBUFFORCE, even to uid 0, and some files of /proc stay closed.
func Rootless() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return os.Geteuid() != 0
	}
	return strings.Join(strings.Fields(string(b)), " ") != "0 0 4294967295"
}

package netns

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The steps of making a sandbox, as HostError.Doing names them.
const (
	doClone     = "making namespaces"
	doPrivate   = "making mounts private"
	doMountProc = "mounting /proc"
	doLoopback  = "bringing lo up"
	doLock      = "making the iptables lock"
	doStart     = "starting the program"
)

// Init returns at once unless this process is the init of a sandbox, which
// lives and ends in it. Call it first of all in main or TestMain, before
// flags are parsed or goroutines started.
func Init() {
	n, ok := strings.CutPrefix(os.Getenv(marker), "init:")
	if !ok || os.Getpid() != 1 {
		return
	}
	extra, err := strconv.Atoi(n)
	if err != nil {
		fmt.Fprintf(os.Stderr, "netns: bad %s: %v\n", marker, err)
		os.Exit(1)
	}
	os.Exit(runInit(extra))
}

// setupStep is a step that failed.
type setupStep struct {
	doing string
	err   error
}

// runInit is the life of pid 1: set up, start the program, reap, end with it.
func runInit(extra int) int {
	runtime.LockOSThread()
	status := os.NewFile(uintptr(3+extra), "status")
	syscall.CloseOnExec(3 + extra)
	if launcherGone(3 + extra) {
		return 1
	}

	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT,
		unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH)
	pid, failed := setUpAndStart(extra)
	if failed != nil {
		var errno syscall.Errno
		errors.As(failed.err, &errno)
		fmt.Fprintf(status, "%s\n%d\n%v", failed.doing, int(errno), failed.err)
		return 1
	}
	// Hold nothing of the program's, so that whoever reads from it sees
	// its end.
	status.Close()
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	for fd := 0; err == nil && fd < 3+extra; fd++ {
		if fd != 2 {
			_ = unix.Dup3(null, fd, unix.O_CLOEXEC)
		}
	}
	go func() {
		for sig := range signals {
			if n, ok := sig.(syscall.Signal); ok {
				_ = unix.Kill(pid, n)
			}
		}
	}()
	return reap(pid)
}

// launcherGone reports whether nobody reads the status pipe any more. A
// launcher killed between clone(2) and the child's prctl(PR_SET_PDEATHSIG)
// sends no signal, and the usual check for it, getppid(2), always gives 0 in
// a new pid namespace. The kernel closes a process's files before it sends
// death signals, so one of the two always tells.
func launcherGone(status int) bool {
	fds := []unix.PollFd{{Fd: int32(status)}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 1 && fds[0].Revents&unix.POLLERR != 0
}

func setUpAndStart(extra int) (pid int, failed *setupStep) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 0, &setupStep{doPrivate, err}
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return 0, &setupStep{doMountProc, err}
	}
	if Rootless() {
		// The first network namespace was made together with the user namespace,
		// before that knew any uid. To such a one the kernel gives files below
		// /proc/net that belong to root outside, and iptables-legacy cannot read
		// its own (proc_net_ns_init of linux/fs/proc/proc_net.c).
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return 0, &setupStep{doClone, err}
		}
	}
	if err := loopbackUp(); err != nil {
		return 0, &setupStep{doLoopback, err}
	}
	lock, err := lockFile()
	if err != nil {
		return 0, &setupStep{doLock, err}
	}
	files := make([]uintptr, 3+extra)
	for i := range files {
		files[i] = uintptr(i)
	}
	pid, err = syscall.ForkExec("/proc/self/exe", os.Args, &syscall.ProcAttr{
		Env:   programEnv(os.Environ(), marker+"=inside", "XTABLES_LOCKFILE="+lock),
		Files: files,
		Sys:   &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		return 0, &setupStep{doStart, err}
	}
	return pid, nil
}

// lockFile returns the path of a lock for iptables-legacy, which else wants
// to create /run/xtables.lock: an ordinary user may not, and root would wait
// for the host's own iptables. The file is a memfd of this init: it has no
// name that could be left behind, and is gone with the sandbox.
func lockFile() (string, error) {
	fd, err := unix.MemfdCreate("xtables.lock", unix.MFD_CLOEXEC)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("/proc/1/fd/%d", fd), nil
}

// programEnv replaces variables in an environment.
func programEnv(env []string, set ...string) []string {
	var out []string
	for _, kv := range env {
		name, _, _ := strings.Cut(kv, "=")
		if name != marker && name != "XTABLES_LOCKFILE" {
			out = append(out, kv)
		}
	}
	return append(out, set...)
}

// reap waits for every child, orphans included, until the program has ended.
// Nothing else in this process forks, so no child is stolen from anyone.
func reap(program int) int {
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 1 // the program is gone without a trace: cannot happen
		case pid == program && ws.Exited():
			return ws.ExitStatus()
		case pid == program && ws.Signaled():
			return 128 + int(ws.Signal())
		}
	}
}

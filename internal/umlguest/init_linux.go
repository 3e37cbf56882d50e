package umlguest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// role tells a process of ours which part it plays: "launch" becomes the
// kernel, "init" is the guest's first process, "inside" the program and its
// children.
const role = "KPTRACE_GUEST"

const (
	line   = "/dev/ttyS0"
	ownDir = "/run/kptrace-guest" // tools of ours, first in PATH
	loader = ownDir + "/modprobe" // what the kernel calls for a module

	narrowLoader = ownDir + "/modprobe-narrow" // what that calls on a CPU with wide registers
	modulesDir   = "/usr/lib/uml/modules"      // where Debian puts them
	indexLink    = "/run/kptrace-guest/mods"   // the modules of the running kernel
)

// Init returns at once unless this process is a part of a guest: the one that
// becomes its kernel, its first process, or its module loader, all of which
// live and end here. Call it first of all in main or TestMain, before flags
// are parsed or goroutines started. It calls netns.Init.
func Init() {
	// The kernel calls it by its path, others by its name.
	if os.Args[0] == loader || os.Args[0] == narrowLoader || os.Args[0] == filepath.Base(loader) && Inside() {
		os.Exit(modprobe(os.Args[1:]))
	}
	initSandbox()
	switch os.Getenv(role) {
	case "launch":
		fmt.Fprintln(os.Stderr, "umlguest:", launch())
		os.Exit(1)
	case "init":
		if os.Getpid() == 1 {
			runInit()
		}
	}
}

// Inside reports whether this process runs in a guest.
func Inside() bool { return os.Getenv(role) == "inside" }

// runInit is the life of the guest's first process. It never returns: an init
// that ends is a kernel panic.
func runInit() {
	runtime.LockOSThread()
	var out frameWriter
	code, err := func() (int, error) {
		tty, err := openLine()
		if err != nil {
			return 0, err
		}
		out.w = tty
		if err := out.write(kindHello, nil); err != nil {
			return 0, err
		}
		k, b, err := readFrame(tty)
		if err != nil || k != kindOrder {
			return 0, fmt.Errorf("no order came: %q %w", k, err)
		}
		var o order
		if err := json.Unmarshal(b, &o); err != nil {
			return 0, err
		}
		info, err := o.setUp()
		if err != nil {
			return 0, err
		}
		b, err = json.Marshal(info)
		if err != nil {
			return 0, err
		}
		if err := out.write(kindBooted, b); err != nil {
			return 0, err
		}
		return o.run(tty, &out)
	}()
	unix.Sync()
	switch {
	case out.w == nil:
		fmt.Fprintln(os.Stderr, "umlguest: guest:", err) // the console: the host shows its end
	case err != nil:
		_ = out.write(kindFailed, []byte(err.Error()))
	default:
		_ = out.number(kindExit, code)
	}
	if out.w != nil {
		time.Sleep(time.Minute) // the host ends us
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

// openLine opens the serial line and makes it carry bytes as they are.
func openLine() (*os.File, error) {
	// Most kernels have mounted it already (CONFIG_DEVTMPFS_MOUNT).
	if err := unix.Mount("dev", "/dev", "devtmpfs", 0, "mode=0755"); err != nil && !errors.Is(err, unix.EBUSY) {
		return nil, fmt.Errorf("mounting /dev: %w", err)
	}
	fd, err := unix.Open(line, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", line, err)
	}
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", line, err)
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = t.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8 | unix.CREAD | unix.CLOCAL
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, t); err != nil {
		return nil, fmt.Errorf("%s: %w", line, err)
	}
	return os.NewFile(uintptr(fd), line), nil
}

// setUp makes the guest a system.
func (o *order) setUp() (Info, error) {
	mounts := []struct{ what, at, kind, data string }{
		{"proc", "/proc", "proc", ""},
		{"sys", "/sys", "sysfs", ""},
		{"run", "/run", "tmpfs", "mode=0755"},
	}
	for _, m := range mounts {
		if err := unix.Mount(m.what, m.at, m.kind, 0, m.data); err != nil {
			return Info{}, fmt.Errorf("mounting %s: %w", m.at, err)
		}
	}
	for _, d := range []string{"/dev/pts", "/dev/shm", ownDir, "/run/tmp", "/run/netns"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return Info{}, err
		}
	}
	_ = unix.Mount("devpts", "/dev/pts", "devpts", 0, "ptmxmode=0666")
	_ = unix.Mount("shm", "/dev/shm", "tmpfs", 0, "")
	_ = os.Symlink("/proc/self/fd", "/dev/fd")
	for _, d := range o.Share {
		// The kernel's hostfs takes the folder of the host as its option.
		if err := unix.Mount("share", d, "hostfs", 0, d); err != nil {
			return Info{}, fmt.Errorf("sharing %s: %w", d, err)
		}
	}
	if err := unix.Sethostname([]byte("guest")); err != nil {
		return Info{}, err
	}
	if err := o.tools(); err != nil {
		return Info{}, err
	}
	info := Info{Release: release(), CPUs: runtime.NumCPU()}
	index, err := openModules()
	if err != nil {
		return info, err
	}
	for _, name := range o.Modules {
		if err := index.load(name); err != nil {
			if info.Missing == nil {
				info.Missing = map[string]string{}
			}
			info.Missing[name] = err.Error()
		}
	}
	return info, loopbackUp()
}

// loader makes this program the module loader. What the kernel starts gets an
// environment of the kernel's: where programs must be told to use no wide registers,
// a script tells them.
func (o *order) loader() error {
	if os.Getenv("GODEBUG") != narrowGo {
		return os.Symlink(o.Path, loader)
	}
	if err := os.Symlink(o.Path, narrowLoader); err != nil {
		return err
	}
	return os.WriteFile(loader, []byte("#!/bin/sh\nGODEBUG="+narrowGo+" exec "+narrowLoader+" \"$@\"\n"), 0o755)
}

// tools puts the module loader and the iptables that work here first in PATH.
func (o *order) tools() error {
	path := ""
	for _, kv := range o.Env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			path = v
		}
	}
	if err := o.loader(); err != nil {
		return err
	}
	if err := os.WriteFile("/proc/sys/kernel/modprobe", []byte(loader), 0); err != nil {
		return fmt.Errorf("naming the module loader: %w", err)
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, verb := range []string{"", "-save", "-restore"} {
			for _, dir := range append(filepath.SplitList(path), "/usr/sbin", "/sbin") {
				legacy := filepath.Join(dir, family+"-legacy"+verb)
				if unix.Access(legacy, unix.X_OK) == nil {
					if err := os.Symlink(legacy, filepath.Join(ownDir, family+verb)); err != nil {
						return err
					}
					break
				}
			}
		}
	}
	o.Env = append(o.Env, "PATH="+ownDir+":"+path, "XTABLES_LOCKFILE=/run/xtables.lock",
		"TMPDIR=/run/tmp", "XDG_RUNTIME_DIR=", role+"=inside")
	return nil
}

func release() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	b, _, _ := bytes.Cut(u.Release[:], []byte{0})
	return string(b)
}

// run starts the program, carries its streams, and reaps until it has ended.
func (o *order) run(tty io.Reader, out *frameWriter) (int, error) {
	var theirs, ours [3]*os.File
	for i := range theirs {
		r, w, err := os.Pipe()
		if err != nil {
			return 0, err
		}
		theirs[i], ours[i] = w, r
		if i == 0 {
			theirs[i], ours[i] = r, w
		}
	}
	pid, err := syscall.ForkExec(o.Path, o.Args, &syscall.ProcAttr{
		Dir: o.Dir, Env: lastOfEach(o.Env),
		Files: []uintptr{theirs[0].Fd(), theirs[1].Fd(), theirs[2].Fd()},
	})
	if err != nil {
		return 0, fmt.Errorf("starting %s in %s: %w", o.Path, o.Dir, err)
	}
	for _, f := range theirs {
		f.Close()
	}
	if !o.Stdin {
		ours[0].Close()
	}
	go obey(tty, pid, ours[0])
	copied := make(chan struct{})
	for i, k := range map[int]kind{1: kindStdout, 2: kindStderr} {
		go func() {
			_, _ = io.Copy(stream{out, k}, onlyReader{ours[i]})
			copied <- struct{}{}
		}()
	}
	code := reap(pid)
	// Whoever still holds the pipes has lost its purpose.
	_ = unix.Kill(-1, unix.SIGKILL)
	<-copied
	<-copied
	return code, nil
}

// onlyReader keeps io.Copy from splicing into a terminal.
type onlyReader struct{ io.Reader }

// obey hands input and signals on to the program.
func obey(tty io.Reader, pid int, stdin io.WriteCloser) {
	for {
		k, b, err := readFrame(tty)
		if err != nil {
			return
		}
		switch {
		case k == kindSignal:
			_ = unix.Kill(pid, unix.Signal(frameNumber(b)))
		case k == kindStdin && len(b) == 0:
			stdin.Close()
		case k == kindStdin:
			_, _ = stdin.Write(b) // the program need not read it
		}
	}
}

// reap waits for every child, orphans included, until the program has ended.
func reap(program int) int {
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 1
		case pid == program && ws.Exited():
			return ws.ExitStatus()
		case pid == program && ws.Signaled():
			return 128 + int(ws.Signal())
		}
	}
}

// lastOfEach keeps the last value of each name.
func lastOfEach(env []string) []string {
	at := map[string]int{}
	var out []string
	for _, kv := range env {
		name, _, _ := strings.Cut(kv, "=")
		if i, ok := at[name]; ok {
			out[i] = kv
			continue
		}
		at[name] = len(out)
		out = append(out, kv)
	}
	return out
}

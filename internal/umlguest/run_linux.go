package umlguest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"golang.org/x/sys/unix"
)

const (
	// memoryEnv and kernelEnv are for the launcher and the guest's init.
	memoryEnv = "KPTRACE_GUEST_MEMORY"
	kernelEnv = "KPTRACE_GUEST_KERNEL"

	defaultGrace = 5 * time.Second
	// bootTime is how long a guest may take until its init speaks; two
	// seconds are usual, on a busy machine ten.
	bootTime = 2 * time.Minute
)

// errMissing says what to install.
var errMissing = errors.New("install Debian's package user-mode-linux, or run make deps")

func initSandbox() { netns.Init() }

// Available says why no guest can be booted here, or nil.
func Available() error {
	_, err := findKernel()
	return err
}

func findKernel() (string, error) {
	kernel, err := exec.LookPath(Kernel)
	if err != nil {
		return "", fmt.Errorf("umlguest: there is no %s: %w", Kernel, errMissing)
	}
	if kernel, err = filepath.EvalSymlinks(kernel); err == nil {
		kernel, err = filepath.Abs(kernel)
	}
	return kernel, err
}

// Run boots a guest, runs our own binary in it, and returns its exit code,
// 128+N if signal N ended it. When ctx ends the program is sent SIGTERM, and
// the guest is killed after Spec.Grace; the error then wraps the cause. The
// guest is gone when Run returns, or when this process dies.
func Run(ctx context.Context, s Spec) (int, error) {
	kernel, err := findKernel()
	if err != nil {
		return -1, err
	}
	o, err := s.order()
	if err != nil {
		return -1, err
	}
	host, guest, err := linePair()
	if err != nil {
		return -1, err
	}
	defer host.Close()
	defer guest.Close()

	relay := make(chan os.Signal, 8)
	if len(s.Forward) > 0 {
		signal.Notify(relay, s.Forward...)
		defer signal.Stop(relay)
	}
	memory := s.Memory
	if memory == 0 {
		memory = DefaultMemory
	}
	g := &guestRun{spec: s, order: o, line: host, out: frameWriter{w: host},
		hello: make(chan struct{}), ended: make(chan struct{})}
	alive, kill := context.WithCancelCause(context.WithoutCancel(ctx))
	defer kill(nil)
	console := &tail{max: 4 << 10}
	gone := make(chan error, 1)
	go func() {
		_, err := netns.Reexec(alive, netns.Sandbox{
			Env: []string{role + "=launch", fmt.Sprintf("%s=%d", memoryEnv, memory), kernelEnv + "=" + kernel},
			Dir: "/", Stdout: console, Stderr: console, ExtraFiles: []*os.File{guest}, Grace: -1,
		})
		gone <- err
	}()
	go g.listen()
	cause := g.attend(ctx, relay, gone)
	kill(cause)
	<-g.ended // what the program wrote has been handed on
	var host2 *netns.HostError
	switch {
	case errors.As(g.goneErr, &host2):
		return -1, g.goneErr
	case cause != nil:
		return -1, fmt.Errorf("umlguest: guest killed: %w", cause)
	case g.err != nil:
		return -1, fmt.Errorf("umlguest: %w%s", g.err, console.says())
	}
	return g.code, nil
}

// order is what the guest's init has to do.
func (s *Spec) order() (order, error) {
	self, err := os.Executable()
	if err != nil {
		return order{}, fmt.Errorf("umlguest: %w", err)
	}
	dir := s.Dir
	if dir == "" {
		if dir, err = os.Getwd(); err != nil {
			return order{}, fmt.Errorf("umlguest: %w", err)
		}
	}
	env := make([]string, 0, len(os.Environ())+len(s.Env))
	for _, kv := range append(os.Environ(), s.Env...) {
		// The marks of the host's sandboxes mean nothing inside.
		if !strings.HasPrefix(kv, "KPTRACE_SANDBOX=") && !strings.HasPrefix(kv, role+"=") {
			env = append(env, kv)
		}
	}
	if wideRegisters() {
		env = append(env, noAVX()...)
	}
	return order{Path: self, Args: append([]string{os.Args[0]}, s.Args...), Env: env, Dir: dir,
		Share: s.Share, Modules: append(Modules(), s.Modules...), Stdin: s.Stdin != nil}, nil
}

// linePair makes the two ends of the serial line. Ours can be closed while it
// is read.
func linePair() (host, guest *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("umlguest: making the serial line: %w", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, nil, fmt.Errorf("umlguest: making the serial line: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "guest line"), os.NewFile(uintptr(fds[1]), "host line"), nil
}

// guestRun is one guest, seen from the host.
type guestRun struct {
	spec  Spec
	order order
	line  *os.File
	out   frameWriter
	hello chan struct{} // closed when the guest's init speaks

	ended   chan struct{} // closed when listen has ended
	code    int           // valid after ended
	err     error         // valid after ended: no exit code came
	goneErr error         // valid after attend: how the sandbox ended by itself
}

// listen hands on what comes from the guest until it ends.
func (g *guestRun) listen() {
	defer close(g.ended)
	for {
		k, b, err := readFrame(g.line)
		if err != nil {
			g.err = fmt.Errorf("the guest ended without an exit code (%w)", err)
			return
		}
		switch k {
		case kindHello:
			close(g.hello)
			if g.err = g.sendOrder(); g.err != nil {
				return
			}
		case kindBooted:
			var info Info
			if json.Unmarshal(b, &info) == nil && g.spec.Booted != nil {
				g.spec.Booted(info)
			}
			if g.spec.Stdin != nil {
				go g.feed()
			}
		case kindStdout:
			hand(g.spec.Stdout, b)
		case kindStderr:
			hand(g.spec.Stderr, b)
		case kindExit:
			g.code = frameNumber(b)
			return
		case kindFailed:
			g.err = fmt.Errorf("guest: %s", b)
			return
		}
	}
}

func hand(w io.Writer, b []byte) {
	if w != nil {
		_, _ = w.Write(b) // a reader that has gone is no reason to stop the program
	}
}

func (g *guestRun) sendOrder() error {
	b, err := json.Marshal(g.order)
	if err != nil {
		return err
	}
	return g.out.write(kindOrder, b)
}

// feed hands the program its input. It ends with the input, or at the next
// piece of it after the guest has ended.
func (g *guestRun) feed() {
	_, err := io.Copy(stream{&g.out, kindStdin}, onlyReader{g.spec.Stdin})
	if err == nil {
		_ = g.out.write(kindStdin, nil)
	}
}

// attend waits for the guest to end, relays signals, and ends the program
// after ctx. It returns why it must be killed, if it must.
func (g *guestRun) attend(ctx context.Context, relay <-chan os.Signal, gone <-chan error) error {
	grace := g.spec.Grace
	if grace == 0 {
		grace = defaultGrace
	}
	boot := time.NewTimer(bootTime)
	defer boot.Stop()
	hello, cancelled := g.hello, ctx.Done()
	var deadline <-chan time.Time
	for {
		select {
		case <-g.ended:
			return nil
		case err := <-gone:
			g.goneErr = err
			g.line.Close()
			return nil
		case <-hello:
			hello = nil
			boot.Stop()
		case <-boot.C:
			g.line.Close()
			return fmt.Errorf("it did not boot within %v", bootTime)
		case sig := <-relay:
			if n, ok := sig.(syscall.Signal); ok {
				_ = g.out.number(kindSignal, int(n))
			}
		case <-cancelled:
			cancelled = nil
			if hello != nil || grace < 0 { // nobody listens yet, or none may
				g.line.Close()
				return context.Cause(ctx)
			}
			_ = g.out.number(kindSignal, int(unix.SIGTERM))
			timer := time.NewTimer(grace)
			defer timer.Stop()
			deadline = timer.C
		case <-deadline:
			g.line.Close()
			return context.Cause(ctx)
		}
	}
}

// launch becomes the guest's kernel. It runs inside the sandbox, whose mount
// namespace gives it a /dev/shm of the guest's size, the only place it writes
// to.
func launch() error {
	kernel, memory := os.Getenv(kernelEnv), os.Getenv(memoryEnv)
	if err := unix.Mount("guest", "/dev/shm", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size="+memory+"m,mode=0700"); err != nil {
		return fmt.Errorf("mounting the guest's memory: %w", err)
	}
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}) // a panic leaves no core
	stayHere()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// The kernel hands on to init, as environment, what it does not know.
	args := []string{kernel, "mem=" + memory + "M", "uml_dir=/dev/shm/", "umid=guest",
		"root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "quiet", "panic=-1",
		"con=null", "con0=null,fd:1", "ssl=null", "ssl0=fd:3",
		"init=" + self, role + "=init", kernelEnv + "=" + kernel}
	env := []string{"TMPDIR=/dev/shm", "HOME=/dev/shm", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	// Unpacked without root it may bring libraries of its own.
	if v, ok := os.LookupEnv("LD_LIBRARY_PATH"); ok {
		env = append(env, "LD_LIBRARY_PATH="+v)
	}
	if wideRegisters() {
		args = append(args, noAVX()...)
		if err := denyXState(); err != nil {
			return err
		}
	}
	return fmt.Errorf("starting %s: %w", kernel, syscall.Exec(kernel, args, env))
}

// stayHere binds this thread, and all that comes of it, to the CPU it runs on,
// which the scheduler has just chosen for it. The guest's kernel and the
// processes that play its own stop and start each other at every system call:
// on one CPU that takes a half to a quarter of the time.
func stayHere() {
	runtime.LockOSThread()
	var cpu uint32
	if _, _, errno := unix.RawSyscall(unix.SYS_GETCPU, uintptr(unsafe.Pointer(&cpu)), 0, 0); errno != 0 {
		return // it is only slower
	}
	var one unix.CPUSet
	one.Set(int(cpu))
	_ = unix.SchedSetaffinity(0, &one)
}

// tail keeps the end of what the guest's console says.
type tail struct {
	max int
	mu  sync.Mutex
	b   []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, b...)
	if over := len(t.b) - t.max; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	return len(b), nil
}

func (t *tail) says() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if text := strings.TrimSpace(strings.ReplaceAll(string(t.b), "\r", "")); text != "" {
		return "; its console ends with:\n" + text
	}
	return ""
}

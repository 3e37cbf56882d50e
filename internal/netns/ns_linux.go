package netns

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// NS is a network namespace, held by a descriptor. It exists as long as a
// descriptor, a process or a thread holds it. The zero value is not usable.
type NS struct {
	file *os.File
	id   uint64
}

// New makes a network namespace with its loopback device up. It needs
// CAP_SYS_ADMIN: root, or the inside of a Sandbox. A host that forbids it gives
// a *HostError.
func New() (*NS, error) {
	var n *NS
	err := offThread(func() (keep bool, err error) {
		// Home is where this thread is, not the caller's, which may be in Do.
		home, err := Current()
		if err != nil {
			return true, err
		}
		defer home.Close()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return true, err
		}
		// From here on the thread must go home or end.
		if n, err = Current(); err == nil {
			err = loopbackUp()
		}
		return unix.Setns(home.Fd(), unix.CLONE_NEWNET) == nil, err
	})
	if err != nil {
		if n != nil {
			n.Close()
		}
		return nil, Explain("making a network namespace", err, false)
	}
	return n, nil
}

// Current returns the network namespace of the calling thread.
func Current() (*NS, error) { return Open("/proc/thread-self/ns/net") }

// Open returns the network namespace that path refers to, such as
// /proc/PID/ns/net.
func Open(path string) (*NS, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("netns: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		file.Close()
		return nil, fmt.Errorf("netns: examining %s: %w", path, err)
	}
	return &NS{file: file, id: st.Ino}, nil
}

// Fd returns the descriptor, for exec.Spec.Netns and for netlink libraries.
// It is valid until Close.
func (n *NS) Fd() int { return int(n.file.Fd()) }

// ID returns the namespace's inode number, which no other living network
// namespace has.
func (n *NS) ID() uint64 { return n.id }

// String returns the namespace as /proc/PID/ns/net shows it.
func (n *NS) String() string { return fmt.Sprintf("net:[%d]", n.id) }

// Close gives up the descriptor.
func (n *NS) Close() error { return n.file.Close() }

// Do runs f in the namespace and returns its error. f runs on a thread of its
// own, never the main one: sockets it opens belong to the namespace for good,
// but goroutines it starts are outside of it. A panic or runtime.Goexit of f
// (t.FailNow) goes on in the caller. If the thread cannot go back where it
// came from it is thrown away.
func (n *NS) Do(f func() error) error {
	defer runtime.KeepAlive(n)
	return offThread(func() (keep bool, err error) {
		home, err := Current()
		if err != nil {
			return true, err
		}
		defer home.Close()
		if err := unix.Setns(n.Fd(), unix.CLONE_NEWNET); err != nil {
			return true, fmt.Errorf("netns: entering %s: %w", n, err)
		}
		err = f()
		return unix.Setns(home.Fd(), unix.CLONE_NEWNET) == nil, err
	})
}

// offThread runs f on a locked thread that is neither the caller's nor the
// main one, whose namespace /proc/self/net and /proc/PID/ns/net show. The
// thread ends with f unless f returns keep; so it does after a panic or
// Goexit, which then goes on in the caller.
func offThread(f func() (keep bool, err error)) error {
	var (
		err      error
		returned bool
		panicked any
		stack    []byte
		done     = make(chan struct{})
	)
	var run func()
	run = func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// Hold the main thread, so that the next goroutine gets another.
			defer runtime.UnlockOSThread()
			go run()
			<-done
			return
		}
		defer close(done)
		defer func() {
			if !returned {
				if panicked = recover(); panicked != nil {
					stack = debug.Stack()
				}
			}
		}()
		var keep bool
		keep, err = f()
		returned = true
		if keep {
			runtime.UnlockOSThread()
		}
	}
	go run()
	<-done
	switch {
	case returned:
		return err
	case panicked != nil:
		panic(fmt.Sprintf("%v\n\nin a network namespace:\n%s", panicked, stack))
	default:
		runtime.Goexit()
		return nil
	}
}

// loopbackUp brings lo up in the calling thread's namespace.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("netns: opening a socket: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("netns: bringing lo up: %w", err)
	}
	return nil
}

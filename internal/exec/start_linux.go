package exec

import (
	"errors"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// pipeDelay bounds how long we go on reading from a pipe that a child's own
// child keeps open after the child has ended.
const pipeDelay = time.Second

// Start starts a program and returns once it is executing. It dies with us,
// whatever kills us.
func Start(s Spec) (*Process, error) {
	path, err := LookPath(s.Path)
	if err != nil {
		return nil, err
	}
	p := &Process{done: make(chan struct{}), ownGroup: s.OwnGroup}
	started := make(chan error, 1)
	go p.run(s, path, started)
	if err := <-started; err != nil {
		return nil, &Error{Path: path, Args: s.Args, Code: -1, Err: err}
	}
	return p, nil
}

// Kill sends SIGKILL to the child, and to its whole process group if it has
// one of its own.
func (p *Process) Kill() error {
	select {
	case <-p.done:
		return nil
	default:
	}
	if p.ownGroup {
		// The leader is not reaped yet, or only just: its id names this
		// group and no other.
		if err := unix.Kill(-p.process.Pid, unix.SIGKILL); err == nil {
			return nil
		}
	}
	return p.process.Kill()
}

// run owns the child from fork to reaping, on one thread.
func (p *Process) run(s Spec, path string, started chan<- error) {
	runtime.LockOSThread()
	if s.Netns == 0 {
		defer runtime.UnlockOSThread()
	} else {
		if unix.Gettid() == unix.Getpid() {
			// /proc/self/net and /proc/PID/ns/net are the main thread's:
			// it must not move. Hold it while another one does the work.
			defer runtime.UnlockOSThread()
			moved := make(chan struct{})
			go func() {
				defer close(moved)
				p.run(s, path, started)
			}()
			<-moved
			return
		}
		// Never unlocked: the runtime ends the thread with this goroutine,
		// and nobody else gets one that is in a foreign namespace.
		if err := unix.Setns(s.Netns, unix.CLONE_NEWNET); err != nil {
			started <- fmt.Errorf("entering network namespace: %w", err)
			return
		}
	}
	head := &headWriter{max: 4096}
	cmd := s.command(path, head)
	if err := cmd.Start(); err != nil {
		started <- err
		return
	}
	p.process = cmd.Process
	started <- nil

	err := cmd.Wait()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // it succeeded; only somebody else still holds its pipe
	}
	p.code = cmd.ProcessState.ExitCode()
	if err != nil {
		failed := &Error{Path: path, Args: s.Args, Code: p.code, Stderr: head.String(), Err: err}
		if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			failed.Signal = ws.Signal()
		}
		p.err = failed
	}
	close(p.done)
}

func (s *Spec) command(path string, head *headWriter) *exec.Cmd {
	cmd := exec.Command(path, s.Args...) //nolint:noctx // Run owns the context: killing is its decision.
	if s.Argv0 != "" {
		cmd.Args[0] = s.Argv0
	}
	cmd.Dir = s.Dir
	cmd.Env = append(cmd.Environ(), s.Env...)
	cmd.Stdin, cmd.Stdout = s.Stdin, s.Stdout
	cmd.Stderr = stderrFor(s.Stderr, s.Stdout, head)
	cmd.ExtraFiles = s.ExtraFiles
	cmd.WaitDelay = pipeDelay
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig:  syscall.SIGKILL,
		Setpgid:    s.OwnGroup,
		Cloneflags: uintptr(s.NewNamespaces),
	}
	if s.NewNamespaces&unix.CLONE_NEWUSER != 0 {
		cmd.SysProcAttr.UidMappings = idMaps(s.UIDMap)
		cmd.SysProcAttr.GidMappings = idMaps(s.GIDMap)
		cmd.SysProcAttr.GidMappingsEnableSetgroups = false
	}
	return cmd
}

// stderrFor keeps the head of what passes through us. A file is handed to
// the child as it is, and one writer for both streams stays one pipe, so
// that their order is kept.
func stderrFor(w, stdout io.Writer, head *headWriter) io.Writer {
	if w == nil {
		return head
	}
	if isFile(w) || sameWriter(w, stdout) {
		return w
	}
	return io.MultiWriter(w, head)
}

func idMaps(ids []IDMap) []syscall.SysProcIDMap {
	out := make([]syscall.SysProcIDMap, 0, len(ids))
	for _, m := range ids {
		out = append(out, syscall.SysProcIDMap{ContainerID: m.Inside, HostID: m.Outside, Size: m.Size})
	}
	return out
}

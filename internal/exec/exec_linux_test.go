package exec

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// roleEnv makes the test binary play a parent that a test can kill.
const roleEnv = "KPTRACE_TEST_ROLE"

func TestMain(m *testing.M) {
	roles := map[string]func() error{"parent": parentRole, "terminal": terminalRole, "netns": netnsRole}
	if role, ok := roles[os.Getenv(roleEnv)]; ok {
		os.Unsetenv(roleEnv)
		if err := role(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// startRole starts the test binary in a role and returns it with the lines
// it prints.
func startRole(t *testing.T, role string, s Spec) (*Process, *bufio.Reader) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	s.Path, s.Env = "/proc/self/exe", []string{roleEnv + "=" + role}
	s.Stdout, s.Stderr = w, os.Stderr
	p, err := Start(s)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Kill(); p.Wait() })
	return p, bufio.NewReader(r)
}

func readPID(t *testing.T, r *bufio.Reader) int {
	t.Helper()
	line, err := r.ReadString('\n')
	if err != nil {
		t.Fatalf("reading a pid: %v", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// alive reports whether pid runs; a zombie does not.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	rest := string(b[strings.LastIndexByte(string(b), ')')+1:])
	return !strings.HasPrefix(strings.TrimSpace(rest), "Z")
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Errorf("not within 5 s: %s", what)
}

// parentRole starts a child from a goroutine that ends at once, then makes
// many threads end, and waits to be killed.
func parentRole() error {
	child := make(chan *Process)
	go func() {
		runtime.LockOSThread() // this thread ends with the goroutine
		p, err := Start(Spec{Path: "sleep", Args: []string{"1000"}})
		if err != nil {
			panic(err)
		}
		child <- p
	}()
	p := <-child
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(runtime.LockOSThread)
	}
	wg.Wait()
	time.Sleep(100 * time.Millisecond)
	if !alive(p.PID()) {
		return errors.New("the child died with a thread that was not its own")
	}
	fmt.Println(p.PID())
	select {}
}

func TestKilledParentTakesChild(t *testing.T) {
	parent, out := startRole(t, "parent", Spec{})
	child := readPID(t, out)
	if !alive(child) {
		t.Fatal("child not running")
	}
	if err := parent.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	var failed *Error
	if err := parent.Wait(); !errors.As(err, &failed) || failed.Signal != unix.SIGKILL {
		t.Errorf("Wait = %v, want an *Error with SIGKILL", err)
	}
	eventually(t, "child gone", func() bool { return !alive(child) })
}

// terminalRole has one child in its group and one in its own, and survives
// SIGINT, as a program that shuts down in good order would.
func terminalRole() error {
	got := make(chan os.Signal, 1)
	signal.Notify(got, unix.SIGINT)
	for _, own := range []bool{false, true} {
		p, err := Start(Spec{Path: "sleep", Args: []string{"1000"}, OwnGroup: own})
		if err != nil {
			return err
		}
		fmt.Println(p.PID())
	}
	<-got
	time.Sleep(time.Hour)
	return nil
}

func TestCtrlCSparesOwnGroup(t *testing.T) {
	parent, out := startRole(t, "terminal", Spec{OwnGroup: true})
	same, own := readPID(t, out), readPID(t, out)
	if err := unix.Kill(-parent.PID(), unix.SIGINT); err != nil { // what a terminal does
		t.Fatal(err)
	}
	eventually(t, "child of the same group gone", func() bool { return !alive(same) })
	if !alive(parent.PID()) || !alive(own) {
		t.Errorf("after SIGINT to the group: parent alive %t, child with its own group alive %t; want both",
			alive(parent.PID()), alive(own))
	}
	if err := parent.Kill(); err != nil {
		t.Fatal(err)
	}
	parent.Wait()
	eventually(t, "the other child gone", func() bool { return !alive(own) })
}

// netnsRole runs in new user and network namespaces, makes a second network
// namespace, and compares where children run.
func netnsRole() error {
	const link = "/proc/self/ns/net"
	here, err := os.Readlink(link)
	if err != nil {
		return err
	}
	var there string
	var fd int
	made := make(chan error)
	var enter func()
	enter = func() {
		runtime.LockOSThread() // for good: this thread ends
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			go enter()
			time.Sleep(10 * time.Millisecond) // hold the main thread while it starts
			return
		}
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		if err == nil {
			there, err = os.Readlink("/proc/thread-self/ns/net")
		}
		made <- err
	}
	go enter()
	if err := <-made; err != nil {
		return err
	}
	var wg sync.WaitGroup
	errs := make(chan error, 40)
	for i := range 40 {
		fd, want := fd, there
		if i%2 == 0 {
			fd, want = 0, here
		}
		wg.Go(func() {
			res, err := Run(context.Background(), Spec{Path: "readlink", Args: []string{link}, Netns: fd})
			if got := strings.TrimSpace(string(res.Stdout)); err == nil && got != want {
				err = fmt.Errorf("netns fd %d: ran in %s, want %s", fd, got, want)
			}
			errs <- err
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			return err
		}
	}
	if after, err := os.Readlink(link); err != nil || after != here {
		return fmt.Errorf("main thread is in %s, was in %s", after, here)
	}
	var stayed error
	for range 200 { // threads end a little after their goroutines
		if stayed = threadIn(there); stayed == nil {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if stayed != nil {
		return stayed
	}
	_, err = Run(context.Background(), Spec{Path: "true", Netns: 9999})
	if !errors.Is(err, unix.EBADF) {
		return fmt.Errorf("bad namespace descriptor: %w, want EBADF", err)
	}
	fmt.Println(os.Getuid(), os.Getgid())
	return nil
}

// threadIn returns an error naming a thread of ours in the network namespace.
func threadIn(ns string) error {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	for _, task := range tasks {
		at, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/net")
		if err == nil && at == ns {
			return fmt.Errorf("thread %s stayed in the foreign namespace", task.Name())
		}
	}
	return nil
}

func TestNamespaces(t *testing.T) {
	p, out := startRole(t, "netns", Spec{
		NewNamespaces: unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UIDMap:        []IDMap{{Inside: 0, Outside: os.Geteuid(), Size: 1}},
		GIDMap:        []IDMap{{Inside: 0, Outside: os.Getegid(), Size: 1}},
	})
	if err := p.Wait(); err != nil {
		t.Fatal(err)
	}
	if line, _ := out.ReadString('\n'); line != "0 0\n" {
		t.Errorf("uid and gid inside = %q, want 0 0", line)
	}
}

func TestRunFailure(t *testing.T) {
	res, err := Run(t.Context(), Spec{Path: "sh", Args: []string{"-c", "echo out; echo one >&2; echo two >&2; exit 3"}})
	var failed *Error
	if !errors.As(err, &failed) {
		t.Fatalf("Run = %v, want an *Error", err)
	}
	if failed.Code != 3 || res.ExitCode != 3 || failed.Stderr != "one\ntwo\n" || string(res.Stdout) != "out\n" {
		t.Errorf("error %+v, result %q %q %d", failed, res.Stdout, res.Stderr, res.ExitCode)
	}
	if !strings.HasSuffix(err.Error(), "exit status 3: one; two") {
		t.Errorf("message %q", err)
	}
	if _, err := Run(t.Context(), Spec{Path: "/etc/passwd"}); !errors.Is(err, os.ErrPermission) {
		t.Errorf("running a text file = %v, want a permission error", err)
	}
}

func TestRunStdinAndEnv(t *testing.T) {
	t.Setenv("KP_A", "old")
	res, err := Run(t.Context(), Spec{Path: "sh", Args: []string{"-c", "cat; echo $KP_A $0"}, Argv0: "sh",
		Env: []string{"KP_A=new"}, Stdin: strings.NewReader("in ")})
	if err != nil || string(res.Stdout) != "in new sh\n" {
		t.Errorf("Run = %q, %v", res.Stdout, err)
	}
}

func TestCancelLetsCommitFinish(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	res, err := Run(ctx, Spec{Path: "sh", Args: []string{"-c", "sleep 0.3; echo done"}, Grace: 10 * time.Second})
	if err != nil || string(res.Stdout) != "done\n" {
		t.Errorf("Run = %q, %v; want the child's own end", res.Stdout, err)
	}
}

func TestCancelKillsAfterGrace(t *testing.T) {
	for _, grace := range []time.Duration{-1, 100 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		begin := time.Now()
		// The shell's own child holds the pipes: the group goes too.
		_, err := Run(ctx, Spec{Path: "sh", Args: []string{"-c", "sleep 1000; true"}, Grace: grace, OwnGroup: true})
		cancel()
		var failed *Error
		if !errors.As(err, &failed) || failed.Signal != unix.SIGKILL || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("grace %v: Run = %v, want SIGKILL and the deadline", grace, err)
		}
		if d := time.Since(begin); d > pipeDelay {
			t.Errorf("grace %v: took %v", grace, d)
		}
	}
}

// A child's child that keeps the pipes open must not hold us up.
func TestForgottenPipe(t *testing.T) {
	begin := time.Now()
	res, err := Run(t.Context(), Spec{Path: "sh", Args: []string{"-c", "sleep 20 & echo $!"}})
	if err != nil || time.Since(begin) > 10*time.Second {
		t.Errorf("Run = %v after %v", err, time.Since(begin))
	}
	if pid, err := strconv.Atoi(strings.TrimSpace(string(res.Stdout))); err == nil {
		unix.Kill(pid, unix.SIGKILL)
	} else {
		t.Error(err)
	}
}

func TestConcurrentRunsLeaveNoZombie(t *testing.T) {
	const n = 200
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			want := strconv.Itoa(i)
			res, err := Run(t.Context(), Spec{Path: "sh", Args: []string{"-c", "cat; exit " + strconv.Itoa(i%2)},
				Stdin: strings.NewReader(want)})
			if string(res.Stdout) != want || res.ExitCode != i%2 || (err != nil) != (i%2 == 1) {
				t.Errorf("run %d: %q, exit %d, %v", i, res.Stdout, res.ExitCode, err)
			}
		})
	}
	wg.Wait()
	var ws syscall.WaitStatus
	if pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil); !errors.Is(err, syscall.ECHILD) {
		t.Errorf("a child is left: wait4 = %d, %v", pid, err)
	}
}

func TestProcess(t *testing.T) {
	p, err := Start(Spec{Path: "sleep", Args: []string{"1000"}})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
		t.Error("ended by itself")
	case <-time.After(20 * time.Millisecond):
	}
	if err := p.Signal(unix.SIGTERM); err != nil {
		t.Error(err)
	}
	var failed *Error
	if err := p.Wait(); !errors.As(err, &failed) || failed.Signal != unix.SIGTERM || p.ExitCode() != -1 {
		t.Errorf("Wait = %v, exit code %d; want SIGTERM, -1", err, p.ExitCode())
	}
	if err := p.Signal(unix.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("Signal after the end = %v", err)
	}
}

package netns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
	"golang.org/x/sys/unix"
)

// watcher is an output that can be waited on.
type watcher struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more chan struct{}
}

func newWatcher() *watcher { return &watcher{more: make(chan struct{}, 1)} }

func (w *watcher) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case w.more <- struct{}{}:
	default:
	}
	return w.buf.Write(b)
}

func (w *watcher) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.String()
}

func (w *watcher) waitFor(t *testing.T, text string) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for !strings.Contains(w.String(), text) {
		select {
		case <-w.more:
		case <-timeout:
			t.Fatalf("%q did not come; output:\n%s", text, w)
		}
	}
}

// startSelf starts the test binary, not in a sandbox.
func startSelf(t *testing.T, out io.Writer, dir string, env []string, args ...string) *exec.Process {
	t.Helper()
	p, err := exec.Start(exec.Spec{Path: "/proc/self/exe", Argv0: os.Args[0], Args: args, Env: env,
		Dir: dir, Stdout: out, Stderr: out, OwnGroup: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Kill(); p.Wait() })
	return p
}

// programRole is what runs inside.
func programRole(how string) {
	switch how {
	case "": // a small crowd: a child, a namespace, an orphan
		if _, err := New(); err != nil {
			panic(err)
		}
		_, err := exec.Start(exec.Spec{Path: "sleep", Args: []string{"1000"}})
		if err == nil {
			_, err = exec.Run(context.Background(), exec.Spec{Path: "sh",
				Args: []string{"-c", "setsid sleep 1000 >/dev/null 2>&1 </dev/null &"}})
		}
		if err != nil {
			panic(err)
		}
		fmt.Println("up")
		time.Sleep(time.Hour)
	case "orphans": // 50 orphans that end, then count zombies
		script := "i=0; while [ $i -lt 50 ]; do (sleep 0.05 &) ; i=$((i+1)); done"
		if _, err := exec.Run(context.Background(), exec.Spec{Path: "sh", Args: []string{"-c", script + " >/dev/null 2>&1"}}); err != nil {
			panic(err)
		}
		for range 100 {
			time.Sleep(20 * time.Millisecond)
			if n := len(procs()); n == 2 {
				break
			}
		}
		fmt.Println("processes", len(procs()), "zombies", zombies())
	case "exit":
		os.Exit(42)
	case "signal":
		unix.Kill(os.Getpid(), unix.SIGKILL)
		time.Sleep(time.Hour)
	case "term": // ends in good order
		got := make(chan os.Signal, 1)
		signal.Notify(got, unix.SIGTERM)
		fmt.Println("ready")
		<-got
		os.Exit(7)
	case "stubborn":
		signal.Ignore(unix.SIGTERM)
		fmt.Println("ready")
		time.Sleep(time.Hour)
	case "files":
		fmt.Println("up")
		b, err := io.ReadAll(os.NewFile(3, "in"))
		out := os.NewFile(4, "out")
		fmt.Fprintf(out, "%s %v %v", b, err, os.Args[1:])
		out.Close() // the reader must see the end now, not when we end
		io.ReadAll(os.Stdin)
	case "nested":
		out := &bytes.Buffer{}
		code, err := Reexec(context.Background(), Sandbox{Env: []string{roleEnv + "=program exit"}, Stdout: out})
		fmt.Println("nested", code, err, out, Inside())
	}
	os.Exit(0)
}

// procs lists the process ids that /proc shows.
func procs() []int {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		panic(err)
	}
	var pids []int
	for _, d := range dirs {
		if pid, err := strconv.Atoi(filepath.Base(d)); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func zombies() int {
	n := 0
	for _, pid := range procs() {
		if zombie(pid) {
			n++
		}
	}
	return n
}

func zombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && bytes.Contains(b, []byte(") Z "))
}

// nsOf returns the namespaces of a process; unreadable ones are absent.
func nsOf(pid int) map[string]string {
	ns := map[string]string{}
	for _, kind := range []string{"net", "pid", "mnt", "user"} {
		if link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind)); err == nil {
			ns[kind] = link
		}
	}
	return ns
}

// holders returns the living processes in any of the namespaces. A zombie is
// dead: its new parent, the machine's pid 1, collects it when it likes.
func holders(of map[string]bool) []int {
	var pids []int
	for _, pid := range procs() {
		if zombie(pid) {
			continue
		}
		for _, link := range nsOf(pid) {
			if of[link] {
				pids = append(pids, pid)
				break
			}
		}
	}
	return pids
}

// children returns the direct children of a process.
func children(pid int) []int {
	var out []int
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, f := range files {
		b, _ := os.ReadFile(f)
		for _, s := range strings.Fields(string(b)) {
			if n, err := strconv.Atoi(s); err == nil {
				out = append(out, n)
			}
		}
	}
	return out
}

// Nothing remains, whoever is killed.
func TestKillLeavesNothing(t *testing.T) {
	if Inside() {
		return
	}
	modes := []string{"", "user"}
	for _, mode := range modes {
		for _, victim := range []string{"launcher", "init", "program"} {
			t.Run(strings.TrimSpace(victim+" "+mode), func(t *testing.T) {
				out := newWatcher()
				launcher := startSelf(t, out, "", []string{roleEnv + "=launcher " + mode})
				out.waitFor(t, "up\n")
				inits := children(launcher.PID())
				if len(inits) != 1 {
					t.Fatalf("launcher has children %v, want one init", inits)
				}
				programs := children(inits[0])
				ours, mine := map[string]bool{}, nsOf(os.Getpid())
				for kind, link := range nsOf(inits[0]) {
					if link != mine[kind] {
						ours[link] = true
					}
				}
				crowd := holders(ours)
				want := 3 // net, pid, mount
				if mode == "user" || os.Geteuid() != 0 {
					want = 4
				}
				// init, program, its child, the orphan
				if len(ours) != want || len(crowd) != 4 {
					t.Fatalf("sandbox has namespaces %v (want %d) and processes %v (want 4)", ours, want, crowd)
				}
				pid := map[string]int{"launcher": launcher.PID(), "init": inits[0], "program": 0}[victim]
				for _, p := range programs {
					if pid == 0 && nsOf(p)["pid"] != "" {
						if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p)); !strings.HasPrefix(string(b), "sleep") {
							pid = p
						}
					}
				}
				if err := unix.Kill(pid, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				<-launcher.Done()
				eventually(t, "no process left in its namespaces", func() bool { return len(holders(ours)) == 0 })
				for _, p := range crowd {
					if err := unix.Kill(p, 0); err == nil && !zombie(p) && !reused(p, ours) {
						t.Errorf("process %d is still there", p)
					}
				}
			})
		}
	}
}

// reused reports that a process id belongs to somebody outside by now.
func reused(pid int, ours map[string]bool) bool {
	for _, link := range nsOf(pid) {
		if ours[link] {
			return false
		}
	}
	return true
}

func reexecProgram(t *testing.T, s Sandbox, how string) (int, string, error) {
	t.Helper()
	out := &bytes.Buffer{}
	if s.Stdout == nil {
		s.Stdout = out
	}
	s.Env, s.Stderr = append(s.Env, roleEnv+"=program "+how), os.Stderr
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	code, err := Reexec(ctx, s)
	return code, out.String(), err
}

func TestReexecExitCodes(t *testing.T) {
	for how, want := range map[string]int{"exit": 42, "signal": 128 + 9} {
		if code, _, err := reexecProgram(t, Sandbox{}, how); code != want || err != nil {
			t.Errorf("%s: %d, %v; want %d", how, code, err, want)
		}
	}
	_, err := Reexec(t.Context(), Sandbox{Dir: "/no/such/folder"})
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent folder: %v", err)
	}
}

func TestReapsOrphans(t *testing.T) {
	code, out, err := reexecProgram(t, Sandbox{}, "orphans")
	if code != 0 || err != nil || out != "processes 2 zombies 0\n" {
		t.Errorf("%d, %v: %q; want only init and program left", code, err, out)
	}
}

func TestNested(t *testing.T) {
	for _, userNS := range []bool{false, true} {
		code, out, err := reexecProgram(t, Sandbox{UserNS: userNS}, "nested")
		if code != 0 || err != nil || out != "nested 42 <nil>  true\n" {
			t.Errorf("user namespace %t: %d, %v: %q", userNS, code, err, out)
		}
	}
}

func TestReexecFiles(t *testing.T) {
	inR, inW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(inW, "hello")
	inW.Close()
	stdinR, stdinW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(outR) // ends only if nobody but the program held it
		got <- string(b)
		stdinW.Close()
	}()
	up, done := newWatcher(), make(chan struct{})
	go func() {
		defer close(done)
		up.waitFor(t, "up") // our own copy must be closed for the reader to see the end
		outW.Close()
	}()
	code, _, err := reexecProgram(t, Sandbox{Args: []string{"-x", "y z"}, Stdin: stdinR, Stdout: up,
		ExtraFiles: []*os.File{inR, outW}}, "files")
	<-done
	if code != 0 || err != nil {
		t.Errorf("%d, %v", code, err)
	}
	if s := <-got; s != "hello <nil> [-x y z]" {
		t.Errorf("through the files came %q", s)
	}
}

func TestCancel(t *testing.T) {
	cause := errors.New("enough")
	for _, tc := range []struct {
		how      string
		wantCode int
		wantErr  error
	}{{"term", 7, nil}, {"stubborn", -1, cause}} {
		ctx, cancel := context.WithCancelCause(t.Context())
		out := newWatcher()
		go func() {
			out.waitFor(t, "ready")
			cancel(cause)
		}()
		code, err := Reexec(ctx, Sandbox{Env: []string{roleEnv + "=program " + tc.how}, Stdout: out,
			Grace: 200 * time.Millisecond})
		if code != tc.wantCode || !errors.Is(err, tc.wantErr) {
			t.Errorf("%s: %d, %v; want %d, %v", tc.how, code, err, tc.wantCode, tc.wantErr)
		}
		cancel(nil)
	}
}

// An init that starts after its launcher's death ends at once.
func TestInitWithoutLauncher(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for _, alive := range []bool{true, false} {
		if !alive {
			r.Close()
		}
		s := Sandbox{Env: []string{roleEnv + "=program exit"}}
		init, err := exec.Start(s.spec(w, !privileged()))
		if err != nil {
			t.Fatal(err)
		}
		if want := map[bool]int{true: 42, false: 1}[alive]; init.ExitCode() != want {
			t.Errorf("launcher alive %t: exit code %d, want %d", alive, init.ExitCode(), want)
		}
	}
}

// The launcher may be killed at any moment of its start.
func TestKillDuringStart(t *testing.T) {
	if Inside() {
		return
	}
	tag := fmt.Sprintf("KPTRACE_TEST_TAG=%d.%d", os.Getpid(), time.Now().UnixNano())
	for i := range 60 {
		p := startSelf(t, io.Discard, "", []string{roleEnv + "=launcher", tag})
		time.Sleep(time.Duration(i) * 500 * time.Microsecond)
		if err := p.Signal(unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		<-p.Done()
	}
	eventually(t, "no process with our tag", func() bool {
		for _, pid := range procs() {
			env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
			if err == nil && bytes.Contains(env, []byte(tag)) {
				return false
			}
		}
		return true
	})
}

// Both iptables flavours work in a sandbox, with the lock in place.
func TestIPTablesInSandbox(t *testing.T) {
	if !sandboxed(t, false) {
		return
	}
	for _, flavour := range []string{"iptables-nft", "iptables-legacy"} {
		in := strings.NewReader("*nat\n:KP-TEST - [0:0]\n-A KP-TEST -p tcp -m comment --comment x -j DNAT --to-destination 127.0.0.1:1\nCOMMIT\n")
		if _, err := exec.Run(t.Context(), exec.Spec{Path: flavour + "-restore", Args: []string{"-w", "5"}, Stdin: in}); err != nil {
			t.Error(err)
		}
		res, err := exec.Run(t.Context(), exec.Spec{Path: flavour + "-save", Args: []string{"-t", "nat"}})
		if err != nil || !strings.Contains(string(res.Stdout), "--to-destination 127.0.0.1:1") {
			t.Errorf("%s-save: %v\n%s", flavour, err, res.Stdout)
		}
	}
	// The lock is a real one: held by us, iptables waits in vain.
	lock, err := os.OpenFile(os.Getenv("XTABLES_LOCKFILE"), os.O_RDONLY|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	_, err = exec.Run(t.Context(), exec.Spec{Path: "iptables-legacy", Args: []string{"-w", "1", "-L"}})
	if err == nil || !strings.Contains(err.Error(), "xtables lock") {
		t.Errorf("with the lock held: %v, want a complaint about the lock", err)
	}
}

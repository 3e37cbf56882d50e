package netns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// roleEnv makes the test binary play a program, a launcher, or a test run
// under Main.
const roleEnv = "KPTRACE_TEST_ROLE"

func TestMain(m *testing.M) {
	Init()
	role, arg, _ := strings.Cut(os.Getenv(roleEnv), " ")
	switch {
	case role == "main":
		Main(m)
	case role == "launcher" && !Inside():
		// Nothing else may stand between this process and its sandbox.
		code, err := Reexec(context.Background(), Sandbox{Env: []string{roleEnv + "=program"},
			Stdout: os.Stdout, Stderr: os.Stderr, UserNS: arg == "user"})
		fmt.Fprintln(os.Stderr, "launcher:", code, err)
		os.Exit(1)
	case role == "program":
		programRole(arg)
	}
	os.Exit(m.Run())
}

// sandboxed makes a test run in a sandbox: it returns true there. Outside it
// runs the test binary for this one test in a Sandbox and returns false.
func sandboxed(t *testing.T, userNS bool) bool {
	t.Helper()
	if Inside() {
		return true
	}
	out := &bytes.Buffer{}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	code, err := Reexec(ctx, Sandbox{Args: []string{"-test.run=^" + t.Name() + "$", "-test.v"},
		Stdout: out, Stderr: out, UserNS: userNS})
	if err != nil || code != 0 || !strings.Contains(out.String(), "--- PASS: "+t.Name()+" ") {
		t.Errorf("in a sandbox: exit code %d, %v\n%s", code, err, out)
	}
	return false
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Errorf("not within 10 s: %s", what)
}

// The tests below with names ending in Child run under Main, started by
// TestMainMirrors.

func TestMainPassChild(t *testing.T) {
	if os.Getenv(roleEnv) != "main" {
		return
	}
	if !Inside() || os.Getuid() != 0 {
		t.Errorf("Inside() %t, uid %d; want true, 0", Inside(), os.Getuid())
	}
	if err := os.WriteFile("written-in-cwd", nil, 0o600); err != nil {
		t.Errorf("the working directory is not usable: %v", err)
	}
	if err := os.WriteFile(t.TempDir()+"/x", nil, 0o600); err != nil {
		t.Errorf("TMPDIR is not usable: %v", err)
	}
	if wd, err := os.Getwd(); err != nil || wd != os.Getenv("KPTRACE_TEST_WD") {
		t.Errorf("working directory %q, %v; want %q", wd, err, os.Getenv("KPTRACE_TEST_WD"))
	}
	fmt.Println("child ran")
}

func TestMainFailChild(t *testing.T) {
	if os.Getenv(roleEnv) == "main" {
		t.Error("as it should")
	}
}

func TestMainHangChild(t *testing.T) {
	if os.Getenv(roleEnv) == "main" {
		fmt.Println("hanging")
		time.Sleep(time.Hour)
	}
}

func TestMainMirrors(t *testing.T) {
	if Inside() {
		return
	}
	run := func(args ...string) (int, string) {
		out := &bytes.Buffer{}
		dir := t.TempDir()
		p := startSelf(t, out, dir, []string{roleEnv + "=main", "KPTRACE_TEST_WD=" + dir}, args...)
		p.Wait()
		return p.ExitCode(), out.String()
	}
	profile := t.TempDir() + "/cover"
	code, out := run("-test.run=^TestMainPassChild$", "-test.v")
	if code != 0 || strings.Count(out, "child ran") != 1 || strings.Count(out, "--- PASS") != 1 {
		t.Errorf("passing test: exit code %d\n%s", code, out)
	}
	if testing.CoverMode() != "" {
		code, out := run("-test.run=^TestMainPassChild$", "-test.coverprofile="+profile)
		if b, err := os.ReadFile(profile); code != 0 || err != nil || len(b) == 0 {
			t.Errorf("coverage: exit code %d, %v\n%s", code, err, out)
		}
	}
	if code, out := run("-test.run=^TestMainFailChild$"); code != 1 || !strings.Contains(out, "as it should") {
		t.Errorf("failing test: exit code %d\n%s", code, out)
	}
	code, out = run("-test.run=^TestMainHangChild$", "-test.timeout=300ms")
	if code != 2 || !strings.Contains(out, "panic: test timed out after 300ms") {
		t.Errorf("hanging test: exit code %d\n%s", code, out)
	}
	if code, out := run("-test.run=^NoSuch$"); code != 0 || !strings.Contains(out, "no tests to run") {
		t.Errorf("no test: exit code %d\n%s", code, out)
	}
}

func TestMainForwardsSignals(t *testing.T) {
	if Inside() {
		return
	}
	out := newWatcher()
	p := startSelf(t, out, t.TempDir(), []string{roleEnv + "=main"}, "-test.run=^TestMainHangChild$")
	out.waitFor(t, "hanging")
	if err := p.Signal(unix.SIGQUIT); err != nil { // what go test sends after its timeout
		t.Fatal(err)
	}
	<-p.Done()
	if p.ExitCode() != 2 || !strings.Contains(out.String(), "SIGQUIT: quit") {
		t.Errorf("exit code %d\n%s", p.ExitCode(), out)
	}
}

func TestReexecForbidden(t *testing.T) {
	if !sandboxed(t, true) {
		return
	}
	// In a user namespace of our own we may forbid more of them.
	for _, tc := range []struct {
		sysctl string
		userNS bool
	}{{"user/max_user_namespaces", true}, {"user/max_net_namespaces", false}} {
		path := "/proc/sys/" + tc.sysctl
		if err := os.WriteFile(path, []byte("0"), 0); err != nil {
			t.Fatal(err)
		}
		_, err := Reexec(t.Context(), Sandbox{UserNS: tc.userNS})
		var host *HostError
		if !errors.As(err, &host) || !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("%s=0: %v, want a *HostError with ENOSPC", tc.sysctl, err)
		}
		name := strings.ReplaceAll(tc.sysctl, "/", ".")
		if !strings.Contains(err.Error(), name+" is 0") || !strings.Contains(host.Fix, "sysctl -w "+name+"=") {
			t.Errorf("%s=0: message %q names no cause or fix", tc.sysctl, err)
		}
		if err := os.WriteFile(path, []byte("100"), 0); err != nil {
			t.Fatal(err)
		}
	}
}

func TestDiagnose(t *testing.T) {
	for _, tc := range []struct {
		name    string
		doing   string
		err     error
		userNS  bool
		sysctls map[string]string
		want    string
	}{
		{"Debian's switch", doClone, unix.EPERM, true, map[string]string{"kernel/unprivileged_userns_clone": "0"},
			"sysctl -w kernel.unprivileged_userns_clone=1"},
		{"Ubuntu's AppArmor", doPrivate, unix.EACCES, true,
			map[string]string{"kernel/apparmor_restrict_unprivileged_userns": "1"},
			"sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"},
		{"none allowed", doClone, unix.ENOSPC, true, map[string]string{"user/max_user_namespaces": "0"},
			"sysctl -w user.max_user_namespaces="},
		{"too many", doClone, unix.ENOSPC, true, map[string]string{"user/max_user_namespaces": "10"}, "limit"},
		{"masked proc", doMountProc, unix.EPERM, false, nil, "unmasked /proc"},
		{"seccomp", doClone, unix.EPERM, true, nil, "seccomp"},
		{"not privileged", doClone, unix.EPERM, false, nil, "run kptrace"},
		{"old kernel", doClone, unix.EINVAL, true, nil, "CONFIG_USER_NS"},
		{"nested", doClone, unix.EUSERS, true, nil, "nested"},
	} {
		err := diagnose(tc.doing, tc.err, tc.userNS, func(path string) string { return tc.sysctls[path] })
		if !strings.Contains(err.Error(), tc.want) || !errors.Is(err, tc.err) || !strings.Contains(err.Error(), tc.doing) {
			t.Errorf("%s: %q does not say %q", tc.name, err, tc.want)
		}
	}
}

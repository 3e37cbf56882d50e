package umlguest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/umlguest"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// roleEnv makes the test binary play the program in a guest, or its launcher.
const roleEnv = "KPTRACE_TEST_ROLE"

func TestMain(m *testing.M) {
	umlguest.Init()
	switch how := os.Getenv(roleEnv); {
	case how == "launcher":
		code, err := umlguest.Run(context.Background(), umlguest.Spec{Env: []string{roleEnv + "=sleep"}, Stdout: os.Stdout})
		fmt.Fprintln(os.Stderr, "launcher:", code, err)
		os.Exit(1)
	case how != "" && umlguest.Inside():
		os.Exit(program(how, os.Args[1:]))
	}
	os.Exit(m.Run())
}

// program is what runs in the guest.
func program(how string, args []string) int {
	switch how {
	case "all":
		return everything(args)
	case "sleep":
		fmt.Println("up")
		time.Sleep(time.Hour)
	case "term":
		got := make(chan os.Signal, 1)
		signal.Notify(got, unix.SIGTERM)
		fmt.Println("up")
		<-got
		return 7
	}
	return 1
}

// everything looks at what a guest promises, so that one boot is enough.
func everything(args []string) int {
	bad := 0
	fail := func(format string, args ...any) { bad++; fmt.Fprintf(os.Stderr, format+"\n", args...) }
	if len(args) != 2 || args[0] != "-x" || args[1] != "y z" {
		fail("arguments %q", args)
	}
	in, err := io.ReadAll(os.Stdin)
	if want := pattern(300 << 10); err != nil || !bytes.Equal(in, want) {
		fail("stdin: %d bytes, %v; want %d", len(in), err, len(want))
	}
	if _, err := os.Stdout.Write(pattern(1 << 20)); err != nil {
		fail("stdout: %v", err)
	}
	if !umlguest.Native() {
		fail("no IPVS in the guest")
	}
	if err := netlink.LinkAdd(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "kube-ipvs0"}}); err != nil {
		fail("dummy: %v", err)
	}
	if fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP); err != nil {
		fail("sctp: %v", err)
	} else {
		unix.Close(fd)
	}
	if err := os.WriteFile(filepath.Join(os.Getenv("SHARED"), "file"), []byte("from the guest"), 0o644); err != nil {
		fail("shared folder: %v", err)
	}
	if err := os.WriteFile("not-here", nil, 0o644); !errors.Is(err, unix.EROFS) {
		fail("writing to the host's files: %v, want read-only", err)
	}
	if err := os.WriteFile(filepath.Join(os.TempDir(), "x"), nil, 0o644); err != nil {
		fail("TMPDIR: %v", err)
	}
	// A module that is not loaded at the start comes when it is asked for.
	if b, err := os.ReadFile("/proc/modules"); err != nil || bytes.Contains(b, []byte("xt_hashlimit")) {
		fail("xt_hashlimit is loaded already, or %v", err)
	}
	for _, rule := range []string{
		"-t nat -A OUTPUT -p tcp -m comment --comment x -m statistic --mode random --probability 0.5 -j DNAT --to-destination 127.0.0.1:1",
		"-t filter -A INPUT -p tcp -m hashlimit --hashlimit-name x --hashlimit-upto 5/s -j ACCEPT",
		"-t mangle -A POSTROUTING -m ipvs --ipvs -j NFLOG --nflog-group 5 --nflog-prefix x",
	} {
		if _, err := exec.Run(context.Background(), exec.Spec{Path: "iptables", Args: strings.Fields(rule)}); err != nil {
			fail("%v", err)
		}
	}
	if _, err := exec.Run(context.Background(), exec.Spec{Path: "modprobe", Args: []string{"-va", "ip_vs", "rtnl-link-ifb"}}); err != nil {
		fail("%v", err)
	}
	if _, err := exec.Run(context.Background(), exec.Spec{Path: "ipset", Args: strings.Fields("create x hash:ip,port,ip timeout 5")}); err != nil {
		fail("%v", err)
	}
	if bad > 0 {
		return 1
	}
	return 42
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7 / 3) // every byte, control characters too
	}
	return b
}

// One boot sees whether streams, files, modules and tools are as promised.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	var info umlguest.Info
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	start := time.Now()
	code, err := umlguest.Run(ctx, umlguest.Spec{
		Args: []string{"-x", "y z"}, Env: []string{roleEnv + "=all", "SHARED=" + dir}, Share: []string{dir},
		Stdin: bytes.NewReader(pattern(300 << 10)), Stdout: &out, Stderr: &errs,
		Booted: func(i umlguest.Info) { info = i; t.Logf("booted in %v: %+v", time.Since(start), i) },
	})
	if code != 42 || err != nil {
		t.Fatalf("exit code %d, %v\n%s", code, err, errs.String())
	}
	if !bytes.Equal(out.Bytes(), pattern(1<<20)) {
		t.Errorf("stdout carried %d bytes, or others than were written", out.Len())
	}
	if info.Release == "" || info.CPUs != 1 || len(info.Missing) > 0 {
		t.Errorf("the guest says %+v; want a release, one CPU, nothing missing", info)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "file")); string(b) != "from the guest" {
		t.Errorf("the shared file holds %q, %v", b, err)
	}
}

func TestCancel(t *testing.T) {
	cause := errors.New("enough")
	for _, tc := range []struct {
		how      string
		wantCode int
		wantErr  error
	}{{"term", 7, nil}, {"sleep", 128 + 15, nil}} {
		ctx, cancel := context.WithCancelCause(t.Context())
		out := newWatcher()
		go func() { <-out.up; cancel(cause) }()
		code, err := umlguest.Run(ctx, umlguest.Spec{Env: []string{roleEnv + "=" + tc.how}, Stdout: out, Grace: time.Minute})
		if code != tc.wantCode || !errors.Is(err, tc.wantErr) {
			t.Errorf("%s: %d, %v; want %d, %v", tc.how, code, err, tc.wantCode, tc.wantErr)
		}
		cancel(nil)
	}
	// Before it has booted there is nobody to ask.
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, cause)
	defer cancel()
	if _, err := umlguest.Run(ctx, umlguest.Spec{Env: []string{roleEnv + "=sleep"}}); !errors.Is(err, cause) {
		t.Errorf("while booting: %v, want the cause", err)
	}
}

// A guest dies with its launcher, and nothing of it remains.
func TestDiesWithLauncher(t *testing.T) {
	tag := fmt.Sprintf("KPTRACE_TEST_TAG=%d.%d", os.Getpid(), time.Now().UnixNano())
	home := t.TempDir()
	out := newWatcher()
	p, err := exec.Start(exec.Spec{Path: "/proc/self/exe", Argv0: os.Args[0],
		Env: []string{roleEnv + "=launcher", tag, "HOME=" + home, "TMPDIR=" + home}, Stdout: out, Stderr: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { p.Kill(); p.Wait() }()
	select {
	case <-out.up:
	case <-p.Done():
		t.Fatal("the launcher ended")
	}
	if n := len(kernels(p.PID())); n == 0 {
		t.Fatal("no kernel found below the launcher: this test sees nothing")
	}
	pids := kernels(p.PID())
	p.Kill()
	p.Wait()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		left := 0
		for _, pid := range pids {
			if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && !bytes.Contains(b, []byte(") Z ")) {
				left++
			}
		}
		if left == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d of the guest's processes %v live on", left, pids)
		}
	}
	if files, _ := os.ReadDir(home); len(files) > 0 {
		t.Errorf("files remain: %v", files)
	}
}

// kernels are the processes below pid.
func kernels(pid int) []int {
	var all []int
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, f := range files {
		b, _ := os.ReadFile(f)
		for _, s := range strings.Fields(string(b)) {
			var n int
			if _, err := fmt.Sscan(s, &n); err == nil {
				all = append(append(all, n), kernels(n)...)
			}
		}
	}
	return all
}

// watcher is an output that tells when the program is up.
type watcher struct{ up chan struct{} }

func newWatcher() *watcher { return &watcher{make(chan struct{})} }

func (w *watcher) Write(b []byte) (int, error) {
	if bytes.Contains(b, []byte("up\n")) {
		close(w.up)
	}
	return len(b), nil
}

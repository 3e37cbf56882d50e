package guesttest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/umlguest"
	"golang.org/x/sys/unix"
)

// Main is for TestMain of a package all of whose tests want IPVS. It runs the
// test binary again in a sandbox (netns.Main): of this kernel where that has
// IPVS, else of a guest. Arguments, output and exit code pass through, so that
// go test reports every test as ever. It does not return.
func Main(m netns.Runner) {
	umlguest.Init()
	switch {
	case umlguest.Inside() || netns.Inside():
		netns.Main(m)
	case umlguest.Native():
		report("%s: IPVS tests run in this kernel", packageName())
		netns.Main(m)
	case elsewhere():
		report("%s: %s", packageName(), leftOut)
		fmt.Println("PASS: " + leftOut)
		os.Exit(0)
	}
	os.Exit(mainInGuest())
}

// elsewhere reports whether another run has the tests that need a guest, which
// is the same kernel for whoever boots it.
func elsewhere() bool { return os.Getenv("KPTRACE_GUEST_TESTS") == "elsewhere" }

// leftOut says so.
const leftOut = "needs a guest, left to another run (KPTRACE_GUEST_TESTS=elsewhere)"

func mainInGuest() int {
	args, verbose := testArgs(os.Args[1:])
	var out bytes.Buffer
	count := &counter{pass: verbose}
	run := guestRun{args: args}
	if verbose {
		run.stdout = os.Stdout
	} else {
		// All is kept to be counted, and shown if something fails.
		run.args = append(run.args, "-test.v=true")
		run.stdout = &out
	}
	count.to = run.stdout
	run.stdout = count
	code, err := run.do(context.Background())
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	if code != 0 {
		_, _ = out.WriteTo(os.Stdout)
	}
	text := fmt.Sprintf("%s: %v in a guest, %s", packageName(), count, run.about())
	fmt.Fprintln(os.Stderr, text)
	report("%s", text)
	if code == 0 && !verbose {
		fmt.Println("PASS")
	}
	return code
}

// packageName is the last part of the import path, which a test binary is
// named after.
func packageName() string {
	dir, err := os.Getwd()
	if err != nil {
		return strings.TrimSuffix(filepath.Base(os.Args[0]), ".test")
	}
	for root := dir; ; root = filepath.Dir(root) {
		if _, err := os.Stat(filepath.Join(root, "go.mod")); err == nil {
			if rel, err := filepath.Rel(root, dir); err == nil {
				return rel
			}
		}
		if root == filepath.Dir(root) {
			return filepath.Base(dir)
		}
	}
}

// testArgs are the arguments for the guest, where only its own files can be
// written, and whether the caller asked to see all output.
func testArgs(args []string) (out []string, verbose bool) {
	for _, a := range args {
		name, value, _ := strings.Cut(strings.TrimLeft(a, "-"), "=")
		switch name {
		case "test.testlogfile": // for go test's cache: without it nothing is cached
			continue
		case "test.v", "test.bench", "test.list":
			verbose = verbose || value != "false"
		}
		out = append(out, a)
	}
	return out, verbose
}

// report appends a line to the report, where one is kept.
func report(format string, args ...any) {
	path := os.Getenv("KPTRACE_GUEST_REPORT")
	if path == "" {
		return
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		fmt.Fprintln(os.Stderr, "guesttest:", err)
		return
	}
	defer f.Close()
	fmt.Fprintf(f, format+"\n", args...)
}

// guestRun is one run of the test binary in a guest.
type guestRun struct {
	args   []string
	memory int
	stdout interface{ Write([]byte) (int, error) }
	info   umlguest.Info
	boot   time.Duration
	took   time.Duration
}

func (r *guestRun) do(ctx context.Context) (int, error) {
	start := time.Now()
	code, err := umlguest.Run(ctx, umlguest.Spec{
		Args: r.args, Stdin: nil, Memory: r.memory, Stdout: r.stdout, Stderr: os.Stderr, Share: shares(r.args),
		Forward: []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT},
		Booted:  func(i umlguest.Info) { r.info, r.boot = i, time.Since(start) },
	})
	r.took = time.Since(start)
	for name, why := range r.info.Missing {
		fmt.Fprintf(os.Stderr, "guesttest: the guest has no module %s: %s\n", name, why)
	}
	return code, err
}

// shares are the folders that the test binary was told to write to.
func shares(args []string) []string {
	var dirs []string
	for _, a := range args {
		name, value, _ := strings.Cut(strings.TrimLeft(a, "-"), "=")
		switch {
		case name == "test.gocoverdir" || name == "test.outputdir" || name == "test.fuzzcachedir":
			dirs = append(dirs, value)
		case strings.HasSuffix(name, "profile") && strings.HasPrefix(name, "test.") && filepath.IsAbs(value):
			dirs = append(dirs, filepath.Dir(value))
		}
	}
	return dirs
}

func (r *guestRun) about() string {
	if r.info.Release == "" {
		return "which did not boot"
	}
	return fmt.Sprintf("user-mode Linux %s with %d CPU (%.1f s, of which %.1f s to boot)",
		r.info.Release, r.info.CPUs, r.took.Seconds(), r.boot.Seconds())
}

// counter counts the results in verbose output that passes through.
type counter struct {
	to                      interface{ Write([]byte) (int, error) }
	pass                    bool
	mu                      sync.Mutex
	rest                    []byte
	passed, failed, skipped int
}

func (c *counter) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rest = append(c.rest, b...)
	for {
		line, rest, ok := bytes.Cut(c.rest, []byte("\n"))
		if !ok {
			break
		}
		switch line = bytes.TrimLeft(line, " \x16"); {
		case bytes.HasPrefix(line, []byte("--- PASS: ")):
			c.passed++
		case bytes.HasPrefix(line, []byte("--- FAIL: ")):
			c.failed++
		case bytes.HasPrefix(line, []byte("--- SKIP: ")):
			c.skipped++
		}
		c.rest = rest
	}
	return c.to.Write(b)
}

// String says how many tests there were, subtests counted each.
func (c *counter) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return fmt.Sprintf("%d tests passed, %d failed, %d skipped", c.passed, c.failed, c.skipped)
}

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/umlguest"
	"github.com/kptrace/kptrace/lab"
)

var update = flag.Bool("update", false, "write the README's demo block from a real run") //nolint:gochecknoglobals // a flag

// TestMain lets the test binary be kptrace when it is called so, and runs the
// tests in a sandbox: as any user, and without touching this machine.
func TestMain(m *testing.M) {
	umlguest.Init()
	if filepath.Base(os.Args[0]) == "kptrace" {
		testscript.Main(m, map[string]func(){"kptrace": main})
	}
	netns.Main(inside{m})
}

// inside puts kptrace into the PATH, and runs the tests: many at once, for
// they wait more than they work.
type inside struct{ m *testing.M }

func (i inside) Run() int {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		if err := flag.Set("test.parallel", "12"); err != nil {
			panic(err) // the flag is not there
		}
	}
	testscript.Main(i.m, map[string]func(){"kptrace": main}) // does not return
	return 1
}

// desk is a place to call kptrace from: a folder of sockets that nobody else
// looks into, and a network namespace.
type desk struct {
	t   *testing.T
	dir string
	env []string
	ns  *netns.NS // nil is the sandbox's own
}

func newDesk(t *testing.T) *desk {
	t.Helper()
	dir := t.TempDir()
	return &desk{t: t, dir: dir, env: []string{
		"KPTRACE_SOCKET=" + filepath.Join(dir, "run", "k.sock"), "KPTRACE_NAMESPACE=", "NO_COLOR=", "TERM=xterm",
	}}
}

// child is a running program with what it said so far.
type child struct {
	*exec.Process
	t        *testing.T
	out, err *watched
}

// start starts a program; it ends with the test at the latest.
func (d *desk) start(name string, args ...string) *child {
	d.t.Helper()
	return d.startWith(exec.Spec{Path: name, Args: args})
}

func (d *desk) startWith(spec exec.Spec) *child {
	d.t.Helper()
	c := &child{t: d.t, out: newWatched(), err: newWatched()}
	spec.Env = append(append([]string{}, d.env...), spec.Env...)
	spec.OwnGroup = true
	if spec.Stdout == nil {
		spec.Stdout = c.out
	}
	if spec.Stderr == nil {
		spec.Stderr = c.err
	}
	if d.ns != nil {
		spec.Netns = d.ns.Fd()
	}
	p, err := exec.Start(spec)
	if err != nil {
		d.t.Fatal(err)
	}
	c.Process = p
	d.t.Cleanup(func() {
		_ = p.Kill()
		<-p.Done()
	})
	return c
}

// kptrace runs kptrace to its end, at most a minute.
func (d *desk) kptrace(args ...string) (code int, stdout, stderr string) {
	d.t.Helper()
	c := d.start("kptrace", args...)
	code = c.end(time.Minute)
	return code, c.out.String(), c.err.String()
}

// must is kptrace with exit code 0; it returns stdout.
func (d *desk) must(args ...string) string {
	d.t.Helper()
	code, out, talk := d.kptrace(args...)
	if code != 0 {
		d.t.Fatalf("kptrace %s: exit %d\n%s%s", strings.Join(args, " "), code, out, talk)
	}
	return out
}

// end waits for the program to end by itself.
func (c *child) end(limit time.Duration) int {
	c.t.Helper()
	select {
	case <-c.Done():
	case <-time.After(limit):
		c.t.Fatalf("it did not end within %v; it said:\n%s%s", limit, c.out, c.err)
	}
	return c.ExitCode()
}

// stop sends a signal and waits for the end.
func (c *child) stop(sig syscall.Signal) int {
	c.t.Helper()
	if err := c.Signal(sig); err != nil {
		c.t.Fatalf("%v: %v\n%s%s", sig, err, c.out, c.err)
	}
	return c.end(30 * time.Second)
}

// watched is output that can be waited for.
type watched struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more chan struct{}
}

func newWatched() *watched { return &watched{more: make(chan struct{}, 1)} }

func (w *watched) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case w.more <- struct{}{}:
	default:
	}
	return w.buf.Write(b)
}

func (w *watched) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.String()
}

// await waits until the output contains text.
func (c *child) await(w *watched, text string, limit time.Duration) {
	c.t.Helper()
	timeout := time.After(limit)
	ended := c.Done()
	for !strings.Contains(w.String(), text) {
		select {
		case <-w.more:
		case <-ended:
			ended = nil
			if !strings.Contains(w.String(), text) {
				c.t.Fatalf("it ended (%d) without saying %q:\n%s%s", c.ExitCode(), text, c.out, c.err)
			}
		case <-timeout:
			c.t.Fatalf("%q did not come within %v:\n%s%s", text, limit, c.out, c.err)
		}
	}
}

// eventually waits for ok, at most limit.
func eventually(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// labUp starts a lab of the demo scenario and more manifests, by file name.
func (d *desk) labUp(more map[string]string, flags ...string) (up *child, manifests string) {
	d.t.Helper()
	manifests = filepath.Join(d.dir, "state")
	if err := lab.WriteScenario(lab.DefaultScenario, manifests); err != nil {
		d.t.Fatal(err)
	}
	for name, text := range more {
		writeFile(d.t, filepath.Join(manifests, name), text)
	}
	up = d.start("kptrace", append([]string{"lab", "up", "--dir", manifests}, flags...)...)
	up.await(up.out, "End it by Ctrl-C", 30*time.Second)
	d.t.Cleanup(func() {
		select {
		case <-up.Done():
		default:
			if code := up.stop(syscall.SIGINT); code != 0 {
				d.t.Errorf("lab up ended with %d:\n%s", code, up.err)
			}
		}
	})
	return up, manifests
}

// writeFile replaces a file at once, as editors do.
func writeFile(t *testing.T, path, text string) {
	t.Helper()
	tmp := path + ".new"
	if err := os.WriteFile(tmp, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, path); err != nil {
		t.Fatal(err)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// flowLine is what the tests read of a flow in JSON.
type flowLine struct {
	ID      string
	Time    time.Time
	Client  struct{ IP, Pod, Namespace string }
	Service struct{ Namespace, Name, Port, Via string }
	Backend *struct{ Pod, IP string }
	Proto   string
	Outcome string
	Reason  string
	Ended   bool

	Decision struct {
		Algorithm, Affinity, Masquerade string
		Candidates                      int
		Probability                     *float64
		Excluded                        struct{ NotReady int }
	}
	DurationMs, EstablishedMs *float64
	BytesIn                   *uint64

	Packets []struct {
		Packet     int
		Name       string
		Incomplete bool
	}
	Path []struct {
		Packet               int
		Kind, Hook, Table    string
		Chain, Purpose, Text string
		Verdict, In, Out     string
	}
	Incomplete bool
}

func (f *flowLine) pod() string {
	if f.Backend == nil {
		return ""
	}
	return f.Backend.Pod
}

// flows parses whole lines of JSON.
func flows(t *testing.T, text string) []flowLine {
	t.Helper()
	var list []flowLine
	for line := range strings.Lines(text) {
		if !strings.HasSuffix(line, "\n") {
			break // not all of it yet
		}
		var f flowLine
		if err := json.Unmarshal([]byte(line), &f); err != nil {
			t.Fatalf("%v in line %s", err, line)
		}
		list = append(list, f)
	}
	return list
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

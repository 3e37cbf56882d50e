package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/exec"
)

// launch starts a lab as a launcher does, and waits until it is up.
func launch(t *testing.T, sockets string) *exec.Process {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "all.yaml"), []byte(twoNodes), 0o644); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p, err := exec.Start(exec.Spec{Path: "/proc/self/exe", Args: []string{dir, sockets}, Env: []string{roleEnv + "=launcher"},
		Stdout: w, Stderr: os.Stderr, OwnGroup: true})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Kill(); _ = p.Wait() })
	up := make([]byte, 3)
	_ = r.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.ReadFull(r, up); err != nil || string(up) != "up\n" {
		t.Fatalf("the lab said %q, %v", up, err)
	}
	return p
}

func control(t *testing.T, sockets string) *Control {
	t.Helper()
	c, err := DialControl(t.Context(), sockets)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// run executes a command in a pod through pipes.
func run(t *testing.T, sockets, target, stdin string, args ...string) (code int, stdout string, err error) {
	t.Helper()
	inR, inW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		io.WriteString(inW, stdin)
		inW.Close()
	}()
	all := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(outR)
		all <- string(b)
	}()
	code, err = control(t, sockets).Exec(within(t, 20*time.Second), target, args, [3]*os.File{inR, outW, os.Stderr})
	inR.Close()
	outW.Close()
	select {
	case stdout = <-all:
	case <-time.After(5 * time.Second):
		t.Fatal("the pipe was held open after the program's end")
	}
	return code, stdout, err
}

func TestExec(t *testing.T) {
	sockets := t.TempDir()
	launch(t, sockets)
	const web = "pod/shop/web"
	if code, out, err := run(t, sockets, web, strings.Repeat("x", 1<<20), "wc", "-c"); code != 0 || err != nil || strings.TrimSpace(out) != "1048576" {
		t.Errorf("through pipes: %d, %q, %v", code, out, err)
	}
	if code, _, err := run(t, sockets, web, "", "sh", "-c", "exit 42"); code != 42 || err != nil {
		t.Errorf("exit 42: %d, %v", code, err)
	}
	if code, _, err := run(t, sockets, web, "", "sh", "-c", "kill -9 $$"); code != 128+9 || err != nil {
		t.Errorf("killed: %d, %v; want 137", code, err)
	}
	if _, _, err := run(t, sockets, web, "", "no-such-program"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent program: %v", err)
	}
	if _, _, err := run(t, sockets, "pod/shop/nobody", "", "true"); err == nil || !strings.Contains(err.Error(), web) {
		t.Errorf("absent pod: %v; want those that exist", err)
	}
	if _, out, err := run(t, sockets, web, "", "cat", "/proc/net/fib_trie"); err != nil || !strings.Contains(out, "10.244.1.10") {
		t.Errorf("not in the pod's namespace: %v\n%s", err, out)
	}
	if _, out, err := run(t, sockets, "node/node2", "", "cat", "/proc/net/fib_trie"); err != nil || !strings.Contains(out, "172.18.0.12") {
		t.Errorf("not in the node's namespace: %v\n%s", err, out)
	}
}

// Programs in the lab find Services, pods and nodes by name; outside nothing
// changes.
func TestNames(t *testing.T) {
	before, err := os.ReadFile("/etc/hosts")
	if err != nil {
		t.Fatal(err)
	}
	sockets := t.TempDir()
	launch(t, sockets)
	for _, tt := range [][2]string{{"foo.shop.svc.cluster.local", "10.96.0.10"}, {"foo.shop", "10.96.0.10"}, {"node2", "172.18.0.12"}, {"near.shop.pod", "10.244.1.2"}} {
		if code, out, err := run(t, sockets, "pod/shop/web", "", "getent", "hosts", tt[0]); code != 0 || err != nil || !strings.HasPrefix(out, tt[1]+" ") {
			t.Errorf("%s is %q (%d, %v), want %s", tt[0], out, code, err, tt[1])
		}
	}
	if after, err := os.ReadFile("/etc/hosts"); err != nil || !bytes.Equal(before, after) {
		t.Errorf("names leak out of the lab: %v\n%s", err, after)
	}
}

// A program ends with whoever asked for it, and their signals reach all of
// its group.
func TestExecSignals(t *testing.T) {
	sockets := t.TempDir()
	launch(t, sockets)
	outR, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	c := control(t, sockets)
	script := "trap 'echo caught; exit 7' INT; echo ready; sleep 100 & wait; echo not reached"
	if err := c.send(Request{Op: "exec", Target: "pod/shop/web", Args: []string{"sh", "-c", script}}, null, outW, os.Stderr); err != nil {
		t.Fatal(err)
	}
	outW.Close()
	buf := make([]byte, 6)
	if _, err := io.ReadFull(outR, buf); err != nil {
		t.Fatal(err)
	}
	if err := c.send(Request{Op: "signal", Signal: int(unix.SIGINT)}); err != nil {
		t.Fatal(err)
	}
	reply, err := c.receive()
	if err != nil || !reply.Exited || reply.Code != 7 {
		t.Errorf("after SIGINT: %+v, %v; want code 7", reply, err)
	}
	c = control(t, sockets)
	outR, outW, err = os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.send(Request{Op: "exec", Target: "pod/shop/web", Args: []string{"sleep", "100"}}, null, outW, os.Stderr); err != nil {
		t.Fatal(err)
	}
	outW.Close()
	time.Sleep(50 * time.Millisecond)
	c.Close()
	_ = outR.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := outR.Read(buf); !errors.Is(err, io.EOF) {
		t.Errorf("the program outlived its caller: %v", err)
	}
}

func TestStatusFaultDown(t *testing.T) {
	sockets := t.TempDir()
	p := launch(t, sockets)
	if err := control(t, sockets).Fault(FaultRefuse, "pod/shop/near", 0); err != nil {
		t.Error(err)
	}
	if err := control(t, sockets).Fault("explode", "pod/shop/near", 0); err == nil {
		t.Error("an unknown fault: no error")
	}
	s, err := control(t, sockets).Status()
	if err != nil || len(s.Nodes) != 2 || len(s.Pods) != 4 {
		t.Fatalf("status: %+v, %v", s, err)
	}
	i := slices.IndexFunc(s.Pods, func(p PodStatus) bool { return p.Name == "near" })
	if i < 0 || !slices.Equal(s.Pods[i].Faults, []string{FaultRefuse}) {
		t.Errorf("status does not show the fault: %+v", s.Pods)
	}
	if err := control(t, sockets).Down(); err != nil {
		t.Error(err)
	}
	select {
	case <-p.Done():
		if p.ExitCode() != 0 {
			t.Errorf("ended by down with code %d", p.ExitCode())
		}
	case <-time.After(10 * time.Second):
		t.Error("still there after down")
	}
	if _, err := DialControl(t.Context(), sockets); !errors.Is(err, ErrNoLab) {
		t.Errorf("after down: %v", err)
	}
}

// inNamespaces lists the living processes in any of the namespaces.
func inNamespaces(of map[string]bool) []string {
	var found []string
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		stat, err := os.ReadFile(dir + "/stat")
		if err != nil || bytes.Contains(stat, []byte(") Z ")) {
			continue
		}
		for _, kind := range []string{"net", "pid", "mnt"} {
			if link, err := os.Readlink(dir + "/ns/" + kind); err == nil && of[link] {
				found = append(found, fmt.Sprintf("%s %.40s", dir, stat))
				break
			}
		}
	}
	return found
}

// namespacesBelow returns the init that a launcher started, and its namespaces.
func namespacesBelow(pid int) (init int, ns map[string]bool) {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, f := range files {
		b, _ := os.ReadFile(f)
		fmt.Sscan(string(b), &init)
	}
	ns = map[string]bool{}
	for _, kind := range []string{"net", "pid", "mnt"} {
		if link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", init, kind)); err == nil {
			ns[link] = true
		}
	}
	return init, ns
}

// Whoever is killed, nothing is left but files, and the next lab starts.
func TestKillLeavesNothing(t *testing.T) {
	for _, victim := range []string{"launcher", "init"} {
		t.Run(victim, func(t *testing.T) {
			sockets := t.TempDir()
			launcher := launch(t, sockets)
			mounts, err := os.ReadFile("/proc/self/mountinfo")
			if err != nil {
				t.Fatal(err)
			}
			init, ns := namespacesBelow(launcher.PID())
			if crowd := inNamespaces(ns); len(ns) != 3 || len(crowd) < 5 {
				t.Fatalf("a lab with namespaces %v and processes %v", ns, crowd)
			}
			pid := launcher.PID()
			if victim == "init" {
				pid = init
			}
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			<-launcher.Done()
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			for len(inNamespaces(ns)) > 0 {
				if ctx.Err() != nil {
					t.Fatalf("left: %v", inNamespaces(ns))
				}
				time.Sleep(5 * time.Millisecond)
			}
			if after, err := os.ReadFile("/proc/self/mountinfo"); err != nil || !bytes.Equal(mounts, after) {
				t.Errorf("mounts changed: %v", err)
			}
			// A dying process leaves its namespaces before its sockets.
			for {
				c, err := DialControl(ctx, sockets)
				if errors.Is(err, ErrNoLab) {
					break
				}
				if err != nil || ctx.Err() != nil {
					t.Fatalf("a dead lab answers: %v", err)
				}
				_ = c.Close()
				time.Sleep(5 * time.Millisecond)
			}
			launch(t, sockets)
		})
	}
}

package netns

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func threadNS() string {
	link, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		return err.Error()
	}
	return link
}

func TestNS(t *testing.T) {
	if !sandboxed(t, false) {
		return
	}
	home := threadNS()
	a, err := New()
	if err != nil {
		t.Fatal(err)
	}
	b, err := New()
	if err != nil {
		t.Fatal(err)
	}
	if a.ID() == b.ID() || a.String() == home {
		t.Fatalf("namespaces %v, %v and ours %s are not three", a, b, home)
	}
	var wg sync.WaitGroup
	for i := range 100 {
		n := []*NS{a, b}[i%2]
		wg.Go(func() {
			if err := n.Do(func() error {
				if got := threadNS(); got != n.String() {
					return fmt.Errorf("in %s, want %v", got, n)
				}
				runtime.Gosched()
				return nil
			}); err != nil {
				t.Error(err)
			}
			if got := threadNS(); got != home {
				t.Errorf("after Do in %s, want %s", got, home)
			}
		})
	}
	wg.Wait()

	// Sockets stay where they were opened; the port is free elsewhere, and
	// lo is up in each.
	var la net.Listener
	if err := a.Do(func() error { la, err = net.Listen("tcp", "127.0.0.1:7777"); return err }); err != nil {
		t.Fatal(err)
	}
	defer la.Close()
	if err := a.Do(func() error {
		c, err := net.Dial("tcp", "127.0.0.1:7777")
		if err == nil {
			c.Close()
		}
		return err
	}); err != nil {
		t.Error(err)
	}
	if err := b.Do(func() error { _, err := net.Dial("tcp", "127.0.0.1:7777"); return err }); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("dial in the other namespace: %v, want refused", err)
	}
	if main, err := os.Readlink("/proc/self/ns/net"); err != nil || main != home {
		t.Errorf("main thread in %s, want %s", main, home)
	}

	file := fmt.Sprintf("/proc/self/fd/%d", a.Fd())
	again, err := Open(file)
	if err != nil || again.ID() != a.ID() {
		t.Errorf("Open: %v, %v", again, err)
	}
	again.Close()
	a.Close()
	if err := a.Do(func() error { return nil }); err == nil {
		t.Error("Do after Close succeeded")
	}
}

func TestSysctl(t *testing.T) {
	if !sandboxed(t, false) {
		return
	}
	a, err := New()
	if err != nil {
		t.Fatal(err)
	}
	b, err := New()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"net.ipv4.ip_forward", "net/ipv4/conf/lo/route_localnet",
		"net.netfilter.nf_conntrack_acct", "net.netfilter.nf_conntrack_tcp_timeout_close"} {
		was, err := b.Sysctl(name)
		if err != nil {
			t.Error(err)
			continue
		}
		if err := a.SetSysctl(name, "1"); err != nil {
			t.Error(err)
		}
		if got, err := a.Sysctl(name); got != "1" || err != nil {
			t.Errorf("%s = %q, %v; want 1", name, got, err)
		}
		if got, err := b.Sysctl(name); got != was || err != nil {
			t.Errorf("%s in the other namespace = %q, %v; want %q still", name, got, err, was)
		}
	}
	if _, err := a.Sysctl("net.no.such"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent sysctl: %v", err)
	}
	if err := a.SetSysctl("net.ipv4.ip_forward", "rubbish"); !errors.Is(err, unix.EINVAL) {
		t.Errorf("rubbish value: %v", err)
	}
}

func TestDoPanicAndGoexit(t *testing.T) {
	if !sandboxed(t, false) {
		return
	}
	n, err := New()
	if err != nil {
		t.Fatal(err)
	}
	func() {
		defer func() {
			if r := fmt.Sprint(recover()); !strings.Contains(r, "boom") || !strings.Contains(r, "ns_linux_test.go") {
				t.Errorf("recovered %q, want the panic and where it came from", r)
			}
		}()
		n.Do(func() error { panic("boom") })
	}()
	var wg sync.WaitGroup
	wg.Go(func() {
		n.Do(func() error { runtime.Goexit(); return nil })
		t.Error("Do returned after Goexit")
	})
	wg.Wait()
	eventually(t, "threads in the namespace gone", func() bool {
		tasks, _ := os.ReadDir("/proc/self/task")
		for _, task := range tasks {
			if link, _ := os.Readlink("/proc/self/task/" + task.Name() + "/ns/net"); link == n.String() {
				return false
			}
		}
		return true
	})
	// The namespace itself is gone with its descriptor.
	n.Close()
	time.Sleep(time.Millisecond)
}

func TestRootless(t *testing.T) {
	if !Inside() && os.Geteuid() == 0 && Rootless() {
		t.Log("this root is itself in a user namespace")
	}
	if !sandboxed(t, true) {
		return
	}
	if !Rootless() || os.Getuid() != 0 {
		t.Errorf("in a user namespace: Rootless() %t, uid %d; want true, 0", Rootless(), os.Getuid())
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 1<<24); !errors.Is(err, unix.EPERM) {
		t.Errorf("SO_RCVBUFFORCE: %v; Rootless promises EPERM", err)
	}
	// What is below /proc/net is ours, or iptables-legacy could not read its tables.
	var st unix.Stat_t
	if err := unix.Stat("/proc/net/dev", &st); err != nil || st.Uid != 0 || st.Gid != 0 {
		t.Errorf("/proc/net/dev: owner %d:%d, %v; want 0:0", st.Uid, st.Gid, err)
	}
}

// TestNewInsideDo makes namespaces inside of one: no thread may stay in it.
func TestNewInsideDo(t *testing.T) {
	if !sandboxed(t, false) {
		return
	}
	outer, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer outer.Close()
	for range 20 {
		err := outer.Do(func() error {
			inner, err := New()
			if err == nil {
				inner.Close()
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	threads, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range threads {
		if link, err := os.Readlink(thread); err == nil && link == outer.String() {
			t.Errorf("%s is still %s", thread, link)
		}
	}
}

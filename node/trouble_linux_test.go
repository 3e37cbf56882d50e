package node

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/xtables"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/iptables"
)

// troubled is a node with the real iptables mode in this namespace.
type troubled struct {
	t     *testing.T
	addr  string // of healthz
	state chan *proxy.Snapshot

	mu  sync.Mutex
	log strings.Builder
}

func (n *troubled) Write(p []byte) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.log.Write(p)
}

func (n *troubled) said(text string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return strings.Contains(n.log.String(), text)
}

// trouble runs a node until the test ends; then it removes its rules.
func trouble(t *testing.T, flavour, dir string, tools xtables.Tools, noLocalhost bool) *troubled {
	t.Helper()
	loopback(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &troubled{t: t, addr: l.Addr().String(), state: make(chan *proxy.Snapshot, 10)}
	l.Close()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	cfg := Config{
		Name: "node1", Backend: iptables.New(iptables.Config{Flavour: flavour, Tools: tools, LocalhostNodePorts: true}),
		Socket: filepath.Join(dir, "k.sock"), NoLocalhost: noLocalhost, Undo: func() bool { return true },
		SyncPeriod: time.Second, HTTP: HTTPConfig{Healthz: n.addr, HardFail: true},
		Logger: slog.New(slog.NewTextHandler(n, nil)),
		State: func(ctx context.Context, emit func(*proxy.Snapshot)) error {
			for {
				select {
				case s := <-n.state:
					emit(s)
				case <-ctx.Done():
					return nil
				}
			}
		},
	}
	go func() { done <- Run(ctx, cfg) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the node said:\n%s", n.log.String())
		}
	})
	return n
}

// healthz waits for a code.
func (n *troubled) healthz(within time.Duration, code int) {
	n.t.Helper()
	eventually(n.t, within, fmt.Sprintf("healthz answers %d", code), func() bool {
		res, err := http.Get("http://" + n.addr + "/healthz")
		if err != nil {
			return false
		}
		defer res.Body.Close()
		_, _ = io.Copy(io.Discard, res.Body)
		return res.StatusCode == code
	})
}

// rules waits for the cluster IPs of Services in the kernel.
func (n *troubled) rules(within time.Duration, flavour string, names ...string) {
	n.t.Helper()
	eventually(n.t, within, fmt.Sprint("rules of ", names), func() bool {
		res, err := exec.Run(n.t.Context(), exec.Spec{Path: "iptables-" + flavour + "-save", Args: []string{"-t", "nat"}})
		if err != nil {
			n.t.Fatal(err)
		}
		for _, name := range names {
			if !strings.Contains(string(res.Stdout), name+":http cluster IP") {
				return false
			}
		}
		return true
	})
}

// services is a Snapshot of Services with one endpoint each.
func services(names ...string) *proxy.Snapshot {
	s := snapshot(netip.AddrPortFrom(hostIP, 8080))
	one := s.Services[0]
	s.Services = nil
	for i, name := range names {
		one.Name.Name, one.Name.Proto = name, conntrack.TCP
		one.ClusterIP = clusterIP
		for range i {
			one.ClusterIP = one.ClusterIP.Next()
		}
		s.Services = append(s.Services, one)
	}
	return s
}

// TestRestoreFails lets iptables-restore fail for a while.
func TestRestoreFails(t *testing.T) {
	dir := t.TempDir()
	broken := filepath.Join(dir, "broken")
	for _, name := range []string{"iptables-nft", "iptables-nft-save", "iptables-nft-restore", "iptables-legacy", "iptables-legacy-save"} {
		program, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		script := "#!/bin/sh\n"
		if name == "iptables-nft-restore" {
			script += "if [ -e " + broken + " ]; then echo 'the kernel is out of order' >&2; exit 1; fi\n"
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script+"exec "+program+" \"$@\"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	n := trouble(t, "nft", t.TempDir(), xtables.Tools{Dir: dir}, true)
	n.state <- services("one")
	n.rules(30*time.Second, "nft", "shop/one")
	n.healthz(10*time.Second, 200)
	if err := os.WriteFile(broken, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n.state <- services("one", "two")
	n.healthz(30*time.Second, 503)
	if !n.said("the kernel is out of order") {
		t.Error("the log does not say what the program said")
	}
	n.rules(time.Second, "nft", "shop/one") // still there
	if err := os.Remove(broken); err != nil {
		t.Fatal(err)
	}
	n.rules(60*time.Second, "nft", "shop/one", "shop/two")
	n.healthz(30*time.Second, 200)
}

// TestDiskFull runs a node whose state folder takes no more: Services are
// programmed and sysctls set all the same, the log says what it means, and once
// there is room all is written down.
func TestDiskFull(t *testing.T) {
	const name = "net/ipv4/conf/all/route_localnet"
	if err := writeSysctl(name, "0"); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	filler := filepath.Join(dir, "filler")
	fill(t, filler)
	n := trouble(t, "nft", dir, xtables.Tools{}, false)
	n.state <- services("one")
	n.rules(30*time.Second, "nft", "shop/one")
	n.healthz(10*time.Second, 200)
	if now, err := readSysctl(name); err != nil || now != "1" {
		t.Errorf("route_localnet is %s, %v", now, err)
	}
	eventually(t, 10*time.Second, "a word on the disk", func() bool { return n.said("no space left on device") })
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	eventually(t, 2*keepAgain+10*time.Second, "the file of sysctls", func() bool {
		list, err := filepath.Glob(filepath.Join(dir, "netns-*.json"))
		if err != nil || len(list) != 1 {
			return false
		}
		b, err := os.ReadFile(list[0])
		return err == nil && strings.Contains(string(b), name)
	})
}

// fill writes a file until there is no more room.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 4096; size > 0; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
}

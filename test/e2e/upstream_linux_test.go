//go:build e2e

package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"

	"github.com/kptrace/kptrace/internal/controlplane"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
)

// newNode makes a network namespace with the addresses of the fixture's node,
// from which the API server can be reached.
func newNode(t *testing.T, c *cluster) *netns.NS {
	t.Helper()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	nl, err := netlink.NewHandleAt(vnetns.NsHandle(ns.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	lo, err := nl.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range localAddrs {
		addr, err := netlink.ParseAddr(text)
		if err == nil {
			err = nl.AddrAdd(lo, addr)
		}
		if err != nil {
			t.Fatalf("adding %s: %v", text, err)
		}
	}
	stop, err := c.Forward(ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return ns
}

// log collects what a program writes.
type log struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// flavoured makes a folder in which the programs kube-proxy runs, iptables and
// its kin without more to their names, are those of one flavour.
func flavoured(t *testing.T, fl xtables.Flavour) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"iptables", "ip6tables"} {
		for _, verb := range []string{"", "-save", "-restore"} {
			program, err := exec.LookPath(name + "-" + fl.String() + verb)
			if err != nil {
				t.Fatal(err)
			}
			// A link would do if the program did not look at its own name.
			text := fmt.Sprintf("#!/bin/sh\nexec %s \"$@\"\n", program)
			if err := os.WriteFile(filepath.Join(dir, name+verb), []byte(text), 0o700); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

// kubeProxyFlags are what kube-proxy gets, upstream's and ours.
func kubeProxyFlags(c *cluster) []string {
	return []string{
		"--kubeconfig=" + c.Kubeconfig(controlplane.KubeProxy), "--hostname-override=" + nodeName,
		"--proxy-mode=iptables", "--iptables-min-sync-period=100ms",
		// Not ours to change: the host's.
		"--conntrack-max-per-core=0", "--conntrack-min=0",
		"--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s",
	}
}

// startUpstream runs upstream kube-proxy in a namespace until the test ends.
func startUpstream(t *testing.T, c *cluster, ns *netns.NS, fl xtables.Flavour, flags ...string) *exec.Process {
	t.Helper()
	args := append(append(kubeProxyFlags(c), "--v=2"), flags...)
	out := &log{}
	p, err := exec.Start(exec.Spec{
		Path: filepath.Join(c.bin, "kube-proxy"), Args: args, Netns: ns.Fd(), OwnGroup: true,
		Env: []string{"PATH=" + flavoured(t, fl) + ":" + os.Getenv("PATH")}, Stdout: out, Stderr: out,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("upstream kube-proxy said:\n%s", out)
		}
		end(t, p)
	})
	return p
}

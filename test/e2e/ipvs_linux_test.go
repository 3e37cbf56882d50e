//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/kptrace/kptrace/exporters/text"
	"github.com/kptrace/kptrace/internal/controlplane"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/umlguest/guesttest"
	"github.com/kptrace/kptrace/internal/xtables"
)

// ipvsMemory holds etcd, an API server and a proxy in a guest, in MiB.
const ipvsMemory = 3072

// TestAgentBesideIPVS watches upstream kube-proxy in ipvs mode, and what kptrace's
// own left, in a kernel that has IPVS: all of it runs there, the control plane too.
func TestAgentBesideIPVS(t *testing.T) {
	t.Parallel()
	guesttest.GroupWith(t, ipvsMemory, func(t *testing.T) {
		c := start(t, controlplane.Config{})
		o := &objects{}
		o.add("web", "http:80", "a", nodePort)
		o.add("none", "http:80", "")
		o.slices = o.slices[:1]
		o.slices[0].Endpoints[0].Addresses, o.slices[0].Ports[0].Port = []string{"192.0.2.1"}, ptr(int32(18080))
		o.create(t, c.client)
		t.Run("upstream", func(t *testing.T) {
			n := newIPVSNode(t, c)
			startUpstream(t, c, n, xtables.Legacy, "--proxy-mode=ipvs")
			watchIPVS(t, c, n)
		})
		t.Run("kptrace", func(t *testing.T) {
			n := newIPVSNode(t, c)
			startOurs(t, c, n)
			watchIPVS(t, c, n)
		})
	})
}

// newIPVSNode is a node with a server of its own and a way out.
func newIPVSNode(t *testing.T, c *cluster) *netns.NS {
	t.Helper()
	n := newNode(t, c)
	uplink(t, n)
	serveAt(t, n, "192.0.2.1:18080")
	return n
}

// startOurs runs kptrace proxy in mode ipvs without tracing, which is the agent's.
func startOurs(t *testing.T, c *cluster, n *netns.NS) {
	t.Helper()
	binary, err := filepath.Abs("../../bin/kptrace")
	if err != nil {
		t.Fatal(err)
	}
	out := &log{}
	p, err := exec.Start(exec.Spec{
		Path: binary, Netns: n.Fd(), OwnGroup: true, Stdout: out, Stderr: out,
		Args: append(append([]string{"proxy"}, kubeProxyFlags(c)...), "--proxy-mode=ipvs", "--trace=false", "--socket="+filepath.Join(t.TempDir(), "k.sock")),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("kptrace proxy said:\n%s", out)
		}
		end(t, p)
	})
}

// watchIPVS wants of an agent beside a proxy in ipvs mode what it shows beside
// others, and nothing left behind.
func watchIPVS(t *testing.T, c *cluster, n *netns.NS) {
	t.Helper()
	web, none := service(t, c, "web"), service(t, c, "none")
	to := net.JoinHostPort(web.Spec.ClusterIP, "80")
	eventually(t, "an answer from "+to, func() error { return reaches(n, to) })
	nodePort := uint16(web.Spec.Ports[0].NodePort) //nolint:gosec // a port
	before := allRules(t, n, xtables.Legacy)

	a := startAgent(t, c, n)
	if s, err := a.ask("status"); err != nil || !strings.Contains(s, "beside a kube-proxy in ipvs mode") {
		t.Errorf("%v: %s", err, s)
	}
	for _, to := range []string{to, fmt.Sprintf("192.0.2.1:%d", nodePort)} {
		if err := reaches(n, to); err != nil {
			t.Errorf("%s: %v", to, err)
		}
	}
	if _, err := dial(n, net.JoinHostPort(none.Spec.ClusterIP, "80")); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a Service without endpoints: %v, want ECONNREFUSED", err)
	}
	for via, port := range map[string]uint16{"ClusterIP": 80, "NodePort": nodePort} {
		a.shows(t, "a connection by "+via, func(f *text.FlowJSON) bool {
			return f.Service.Name == "web" && string(f.Service.Via) == via && f.Service.PortNumber == port && f.Decision.Mode == "ipvs" &&
				f.Backend != nil && f.Backend.IP == "192.0.2.1" && f.Backend.Port == 18080 && f.Decision.Candidates == 1 &&
				f.Outcome == "closed" && f.EstablishedMs != nil && len(f.Attempts) == 1
		})
	}
	a.shows(t, "a refusal", func(f *text.FlowJSON) bool {
		return f.Service.Name == "none" && f.Outcome == "rejected" && f.Reason == "no-endpoints"
	})
	if out, err := a.ask("explain", "svc/web", "-n", namespace, "--from", "192.0.2.9"); err != nil || !strings.Contains(out, "192.0.2.1:18080") {
		t.Errorf("explain: %v: %s", err, out)
	}
	eventually(t, "a check that finds nothing", func() error { // upstream comes to IPv6 late
		out, err := a.ask("check")
		if err == nil && out != "" {
			err = errors.New(out)
		}
		return err
	})
	end(t, a.Process)
	// Upstream may still be at work on the other family.
	after := allRules(t, n, xtables.Legacy)
	for line := range strings.Lines(before) {
		if !strings.Contains(after, line) {
			t.Errorf("the agent took away %s", line)
		}
	}
	for line := range strings.Lines(after) {
		if strings.Contains(line, "KPTRACE") && !strings.Contains(before, line) {
			t.Errorf("the agent left %s", line)
		}
	}
}

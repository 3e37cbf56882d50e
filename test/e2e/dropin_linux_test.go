//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/kptrace/kptrace/internal/controlplane"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/internal/xtables"
)

// startKptrace runs `kptrace proxy` with kube-proxy's own flags in a namespace
// until the test ends. It is the binary that `make build` made.
func startKptrace(t *testing.T, c *cluster, ns *netns.NS, fl xtables.Flavour, flags ...string) *exec.Process {
	t.Helper()
	p, _ := runKptrace(t, c, ns, fl, flags...)
	return p
}

// runKptrace is startKptrace that also returns what the process says.
func runKptrace(t *testing.T, c *cluster, ns *netns.NS, fl xtables.Flavour, flags ...string) (*exec.Process, *log) {
	t.Helper()
	p, out, _ := runKptraceEnv(t, c, ns, fl, nil, flags...)
	return p, out
}

// runKptraceEnv does so with more environment; ask asks the proxy something, by a
// command of kptrace.
func runKptraceEnv(t *testing.T, c *cluster, ns *netns.NS, fl xtables.Flavour, env []string, flags ...string) (p *exec.Process, out *log, ask func(...string) (string, error)) {
	t.Helper()
	binary, err := filepath.Abs("../../bin/kptrace")
	if err != nil {
		t.Fatal(err)
	}
	socket := "--socket=" + filepath.Join(t.TempDir(), "k.sock")
	args := append(append([]string{"proxy"}, kubeProxyFlags(c)...), flags...)
	args = append(args, "--iptables-flavour="+fl.String(), socket)
	out = &log{}
	p, err = exec.Start(exec.Spec{Path: binary, Args: args, Env: env, Netns: ns.Fd(), OwnGroup: true, Stdout: out, Stderr: out})
	if err != nil {
		t.Fatalf("%v: build it by `make build`", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("kptrace said:\n%s", out)
		}
		end(t, p)
	})
	return p, out, func(args ...string) (string, error) { return asked(ns, binary, append(args, socket)...) }
}

// asked runs a command of kptrace.
func asked(ns *netns.NS, binary string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	res, err := exec.Run(ctx, exec.Spec{Path: binary, Args: args, Netns: ns.Fd()})
	if err != nil {
		return string(res.Stdout), fmt.Errorf("%w\n%s", err, res.Stdout)
	}
	return string(res.Stdout), nil
}

// await waits until upstream kube-proxy has begun to serve a Service port.
func (p *pair) await(t *testing.T, port string) {
	t.Helper()
	for _, family := range []xtables.Family{xtables.IPv4, xtables.IPv6} {
		eventually(t, port+" in upstream's rules", func() error {
			text, err := (&xtables.Tools{Netns: p.theirs.Fd()}).SaveText(t.Context(), p.flavour, family, "nat", false)
			if err == nil && !strings.Contains(text, port+" cluster IP") {
				err = errors.New("it is not there")
			}
			return err
		})
	}
}

// end ends a process and waits for it.
func end(t *testing.T, p *exec.Process) {
	t.Helper()
	if err := p.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
	select {
	case <-p.Done():
	case <-time.After(20 * time.Second):
		t.Errorf("process %d does not end: %v", p.PID(), p.Kill())
	}
}

// TestDropIn puts `kptrace proxy` in the place of kube-proxy: the same flags,
// the same API server, and in the end the same rules, at the start and after
// every change.
func TestDropIn(t *testing.T) {
	t.Parallel()
	c := start(t, controlplane.Config{ServiceRange: "10.96.0.0/16,fd00:96::/112", RBAC: true})
	fixture().create(t, c.client)
	var pairs []*pair
	for _, fl := range flavours(t) {
		p := newDropIn(t, c, fl, "--cluster-cidr="+clusterCIDR)
		p.await(t, "shop/clusterip:http")
		p.same(t)
		pairs = append(pairs, p)
	}
	for _, s := range steps() {
		if err := s.do(t.Context(), c.client); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
	}
	// Who has this one has all the others.
	last := &objects{}
	last.add("last", "http:80", "a,b local")
	last.write(t, c.client)
	for _, p := range pairs {
		p.await(t, "shop/last:http")
		p.same(t)
	}
}

// TestPackets sends real packets through Services that were made with client-go
// and programmed by `kptrace proxy`.
func TestPackets(t *testing.T) {
	t.Parallel()
	c := start(t, controlplane.Config{RBAC: true})
	ns := newNode(t, c)
	// The node itself is the client, and its endpoints are on lo.
	uplink(t, ns)
	ready, gone := serve(t, ns, "192.0.2.1"), serve(t, ns, "198.51.100.1")
	o := &objects{}
	o.add("web", "http:80", "a", nodePort)
	o.add("none", "http:80", "")
	o.slices = o.slices[:1]
	o.slices[0].Endpoints[0].Addresses = []string{ready.Addr().String()}
	o.slices[0].Ports[0].Port = ptr(int32(ready.Port()))
	o.create(t, c.client)
	startKptrace(t, c, ns, xtables.NFT)

	web, none := service(t, c, "web"), service(t, c, "none")
	for _, to := range []string{
		net.JoinHostPort(web.Spec.ClusterIP, "80"),
		fmt.Sprintf("192.0.2.1:%d", web.Spec.Ports[0].NodePort),
		fmt.Sprintf("127.0.0.1:%d", web.Spec.Ports[0].NodePort),
	} {
		eventually(t, "an answer from "+to, func() error { return answers(ns, to, ready) })
	}
	if _, err := dial(ns, net.JoinHostPort(none.Spec.ClusterIP, "80")); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a Service without endpoints: %v, want ECONNREFUSED", err)
	}

	// The endpoint moves; then the API server goes away, and all goes on.
	e := o.slices[0].DeepCopy()
	e.Endpoints[0].Addresses = []string{gone.Addr().String()}
	e.Ports[0].Port = ptr(int32(gone.Port()))
	if err := replace(t.Context(), c.client, e); err != nil {
		t.Fatal(err)
	}
	to := net.JoinHostPort(web.Spec.ClusterIP, "80")
	eventually(t, "an answer from the other endpoint", func() error { return answers(ns, to, gone) })
	if err := c.StopAPI(); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if err := answers(ns, to, gone); err != nil {
			t.Errorf("without an API server: %v", err)
		}
	}
	if err := c.StartAPI(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := answers(ns, to, gone); err != nil {
		t.Errorf("with the API server back: %v", err)
	}
	eventually(t, "the watch to go on", func() error {
		e.Endpoints[0].Addresses = []string{ready.Addr().String()}
		e.Ports[0].Port = ptr(int32(ready.Port()))
		if err := replace(t.Context(), c.client, e); err != nil {
			return err
		}
		return answers(ns, to, ready)
	})
}

// serve answers each connection to an address in a namespace with the address.
func serve(t *testing.T, ns *netns.NS, ip string) netip.AddrPort {
	t.Helper()
	return serveAt(t, ns, ip+":0")
}

func serveAt(t *testing.T, ns *netns.NS, at string) netip.AddrPort {
	t.Helper()
	var l net.Listener
	err := ns.Do(func() (err error) {
		l, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp", at)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(conn, l.Addr())
			conn.Close()
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// dial connects from a namespace and reads what comes.
func dial(ns *netns.NS, to string) (string, error) {
	var conn net.Conn
	err := ns.Do(func() (err error) {
		conn, err = net.DialTimeout("tcp", to, 2*time.Second)
		return err
	})
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return "", err
	}
	b, err := io.ReadAll(conn)
	return string(b), err
}

func answers(ns *netns.NS, to string, from netip.AddrPort) error {
	got, err := dial(ns, to)
	if err == nil && !strings.HasPrefix(got, from.String()) {
		err = fmt.Errorf("%s answered, want %s", got, from)
	}
	return err
}

// uplink gives a node a way out, so that packets to cluster IPs have a route
// before they are redirected. Nobody is at its other end.
func uplink(t *testing.T, ns *netns.NS) {
	t.Helper()
	nl, err := netlink.NewHandleAt(vnetns.NsHandle(ns.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	out := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "up"}, PeerName: "far"}
	addr, err := netlink.ParseAddr("192.0.2.9/24")
	if err == nil {
		err = nl.LinkAdd(out)
	}
	for _, name := range []string{"up", "far"} {
		if err == nil {
			var l netlink.Link
			if l, err = nl.LinkByName(name); err == nil {
				err = nl.LinkSetUp(l)
			}
		}
	}
	if err == nil {
		err = nl.AddrAdd(out, addr)
	}
	if err == nil {
		err = nl.RouteAdd(&netlink.Route{LinkIndex: out.Index, Gw: net.IPv4(192, 0, 2, 254)})
	}
	if err != nil {
		t.Fatal(err)
	}
}

func service(t *testing.T, c *cluster, name string) *corev1.Service {
	t.Helper()
	s, err := c.client.CoreV1().Services(namespace).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// replace writes an EndpointSlice whatever is there.
func replace(ctx context.Context, client kubernetes.Interface, e *discoveryv1.EndpointSlice) error {
	e.ResourceVersion = ""
	_, err := client.DiscoveryV1().EndpointSlices(namespace).Update(ctx, e, metav1.UpdateOptions{})
	return err
}

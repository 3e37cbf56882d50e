package load

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/nfnl"
	"github.com/kptrace/kptrace/lab"
)

const (
	serverPort       = 8080 // bare
	httpPort         = 8081 // an HTTP server
	endpointsPerNode = 3
)

// world is a lab of nodes that have nothing to do with each other: each has a
// Service of its own with a client and three endpoints, all on the node.
// Whatever is compared runs on nodes of its own, side by side, so that
// measurements can alternate without restarting anything.
type world struct {
	t   testing.TB
	lab *lab.Lab
}

// place is one node of a world.
type place struct {
	w       *world
	name    string
	service netip.AddrPort
	watcher *child // who traces or observes, nil if nobody
}

func nodeName(i int) string { return fmt.Sprintf("n%d", i) }

// manifestsOf describes n nodes.
func manifestsOf(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `---
apiVersion: v1
kind: Node
metadata: {name: %[1]s}
spec: {podCIDR: 10.244.%[2]d.0/24}
status: {addresses: [{type: InternalIP, address: 172.18.0.%[3]d}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: %[1]s}
spec: {nodeName: %[1]s, containers: [{name: c, image: example/load}]}
status: {podIP: 10.244.%[2]d.100}
---
apiVersion: v1
kind: Service
metadata: {name: load, namespace: %[1]s}
spec: {clusterIP: 10.96.0.%[3]d, ports: [{name: bare, port: 80, targetPort: %[4]d}, {name: http, port: 81, targetPort: %[5]d}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: load, namespace: %[1]s, labels: {kubernetes.io/service-name: load}}
addressType: IPv4
ports: [{name: bare, port: %[4]d}, {name: http, port: %[5]d}]
endpoints:
`, nodeName(i), i+1, i+10, serverPort, httpPort)
		for e := range endpointsPerNode {
			fmt.Fprintf(&b, "- {addresses: [10.244.%d.%d], nodeName: %s, conditions: {ready: true}, targetRef: {kind: Pod, namespace: %[3]s, name: server-%d}}\n",
				i+1, e+2, nodeName(i), e)
		}
		for e := range endpointsPerNode {
			fmt.Fprintf(&b, `---
apiVersion: v1
kind: Pod
metadata: {name: server-%[4]d, namespace: %[1]s}
spec: {nodeName: %[1]s, containers: [{name: c, image: example/load}]}
status: {podIP: 10.244.%[2]d.%[3]d}
`, nodeName(i), i+1, e+2, e)
		}
	}
	return b.String()
}

// newWorld makes a lab of n nodes on which nothing runs but the servers.
func newWorld(t testing.TB, n int) *world {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "all.yaml"), []byte(manifestsOf(n)), 0o644); err != nil {
		t.Fatal(err)
	}
	l, err := lab.Start(t.Context(), lab.Config{Dir: dir, SocketDir: t.TempDir(), NoProxy: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range l.Problems() {
		t.Fatalf("problem: %v", p.Error())
	}
	w := &world{t: t, lab: l}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() { cancel(); l.Close() })
	for i := range n {
		for e := range endpointsPerNode {
			at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, byte(i + 1), byte(e + 2)}), serverPort)
			ready, failed := make(chan struct{}), make(chan error, 1)
			go func() {
				failed <- l.Do(lab.PodSpace(nodeName(i), fmt.Sprintf("server-%d", e)), func() error {
					return Serve(ctx, at, func() { close(ready) })
				})
			}()
			select {
			case <-ready:
			case err := <-failed:
				t.Fatal(err)
			}
			w.serveHTTP(i, e)
		}
	}
	return w
}

// serveHTTP runs the HTTP server of Go's library in an endpoint, until the
// world ends.
func (w *world) serveHTTP(i, e int) {
	w.t.Helper()
	srv := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(rw, "ok\n")
	})}
	var l net.Listener
	err := w.lab.Do(lab.PodSpace(nodeName(i), fmt.Sprintf("server-%d", e)), func() (err error) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		l, err = lc.Listen(w.t.Context(), "tcp4", fmt.Sprintf(":%d", httpPort))
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	go func() { _ = srv.Serve(l) }()
	w.t.Cleanup(func() { srv.Close() })
}

func (w *world) place(i int) *place {
	service := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, 0, byte(i + 10)}), 80)
	return &place{w: w, name: nodeName(i), service: service}
}

// child is a process of ours on a node that tells what it has allocated.
type child struct {
	*exec.Process
	ask     io.Writer
	answers *bufio.Reader
	// mute says that it is somebody else's program and does not.
	mute bool
}

// start runs the test binary, or another program, on the node.
func (p *place) start(path string, args ...string) *child {
	p.w.t.Helper()
	in, ask, err := os.Pipe()
	if err != nil {
		p.w.t.Fatal(err)
	}
	answers, out, err := os.Pipe()
	if err != nil {
		p.w.t.Fatal(err)
	}
	spec := exec.Spec{Path: path, Args: args, Stdin: in, Stdout: out, Stderr: os.Stderr}
	c := &child{ask: ask, answers: bufio.NewReader(answers), mute: path != "kptrace"}
	if c.mute {
		null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		if err != nil {
			p.w.t.Fatal(err)
		}
		defer null.Close()
		spec.Stdout, spec.Stderr = null, null
	}
	c.Process, err = p.w.lab.Exec(lab.NodeSpace(p.name), spec)
	in.Close()
	out.Close()
	if err != nil {
		p.w.t.Fatal(err)
	}
	p.w.t.Cleanup(func() { c.stop(); ask.Close(); answers.Close() })
	return c
}

// stop ends the child in good order.
func (c *child) stop() {
	_ = c.Signal(unix.SIGTERM)
	_ = c.Wait() // its end is what matters
}

// memory asks what the child has allocated.
func (c *child) memory(t testing.TB) (m memory) {
	t.Helper()
	if c.mute {
		return m
	}
	if _, err := c.ask.Write([]byte{'?'}); err != nil {
		t.Fatal(err)
	}
	if err := json.NewDecoder(c.answers).Decode(&m); err != nil {
		t.Fatal(err)
	}
	return m
}

// cpu is the processor time a process has used so far, to the nanosecond.
func cpu(t testing.TB, pid int) time.Duration {
	t.Helper()
	var ts unix.Timespec
	// The clock of another process: see MAKE_PROCESS_CPUCLOCK in
	// linux/posix-timers.h.
	if err := unix.ClockGettime(int32(^pid<<3|2), &ts); err != nil {
		t.Fatalf("reading the processor time of %d: %v", pid, err)
	}
	return time.Duration(ts.Nano())
}

func (p *place) socket() string { return p.w.lab.NodeSocket(p.name) }

// proxy runs kptrace on the node and waits until it has programmed the kernel.
func (p *place) proxy(args ...string) *child {
	p.w.t.Helper()
	c := p.start("kptrace", append([]string{"proxy", "-manifests", p.w.lab.Dir(), "-node", p.name, "-socket", p.socket()}, args...)...)
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := p.ready()
		if err == nil {
			return c
		}
		if time.Now().After(deadline) {
			p.w.t.Fatalf("%s is not ready: %v", p.name, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// ready makes a connection through the Service.
func (p *place) ready() error {
	r, err := p.run(context.Background(), Config{Conns: 1, Patience: 300 * time.Millisecond})
	if err == nil && r.Done != 1 {
		err = fmt.Errorf("%v", r.Errors)
	}
	return err
}

// run makes connections from the node's client pod to its Service.
func (p *place) run(ctx context.Context, cfg Config) (r Result, err error) {
	if !cfg.Target.IsValid() {
		cfg.Target = p.service
	}
	doErr := p.w.lab.Do(lab.PodSpace(p.name, "client"), func() error {
		r, err = Run(ctx, cfg)
		return nil
	})
	if err == nil {
		err = doErr
	}
	return r, err
}

// flush removes all conntrack entries of the node, as their timeouts would
// have done in the end: what that costs an observer belongs to the
// connections.
func (p *place) flush() {
	p.w.t.Helper()
	const ctDelete = 2 // IPCTNL_MSG_CT_DELETE; without a tuple it means all
	err := p.w.lab.Do(lab.NodeSpace(p.name), func() error {
		s, err := nfnl.Open(64 << 10)
		if err != nil {
			return err
		}
		defer s.Close()
		return s.Request(nfnl.Type(nfnl.SubsysConntrack, ctDelete), nfnl.FamilyUnspec, 0, nil)
	})
	if err != nil {
		p.w.t.Fatalf("flushing conntrack of %s: %v", p.name, err)
	}
}

// status asks the node's kptrace.
func (p *place) status() *relay.Status {
	p.w.t.Helper()
	c, err := relay.Dial(p.socket())
	if err != nil {
		p.w.t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	s, err := c.Status(ctx)
	if err != nil {
		p.w.t.Fatal(err)
	}
	return s
}

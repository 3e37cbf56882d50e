package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/internal/exec"
	"github.com/kptrace/kptrace/internal/netns"
	"github.com/kptrace/kptrace/proxy"
)

// Lab is a running lab. Its methods may be called from any goroutine.
type Lab struct {
	cfg      Config
	cluster  *Cluster
	problems []proxy.Problem
	world    *world
	started  time.Time
	lock     *os.File
	unname   func() // nil if Services have no names here

	nodesMu sync.Mutex
	nodes   map[string]*exec.Process
	pods    map[string]*pod
	failed  chan NodeEnd

	// last is the connection of whoever asked the lab to end. It is held, not
	// used, so that it closes when all is over.
	last atomic.Pointer[os.File]

	reportMu sync.Mutex
	incident int // the last one, by number
	healed   bool
	// backgrounds are what the incident goes on with.
	backgrounds []*background
	closing     chan struct{}
	close       sync.Once
	faults      sync.Once
	watchers    sync.WaitGroup
}

var errClosed = errors.New("lab: it is closed")

// Start makes a lab and returns when all its programs run; pods serve, and
// clients wait for StartTraffic. It needs the inside of a sandbox
// (internal/netns), and lives until Close or the end of this process. ctx
// bounds the making only.
func Start(ctx context.Context, cfg Config) (*Lab, error) {
	if cfg.Self == nil {
		cfg.Self = []string{"/proc/self/exe"}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	l := &Lab{
		cfg: cfg, started: time.Now(), failed: make(chan NodeEnd, 16), closing: make(chan struct{}),
		nodes: map[string]*exec.Process{}, pods: map[string]*pod{},
	}
	if err := l.start(ctx); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

func (l *Lab) start(ctx context.Context) error {
	var err error
	if l.lock, err = occupy(l.cfg.SocketDir); err != nil {
		return err
	}
	if l.cfg.Dir == "" {
		l.cfg.Dir = filepath.Join(l.cfg.SocketDir, manifestsDir)
		if err := WriteScenario(cmp.Or(l.cfg.Scenario, DefaultScenario), l.cfg.Dir); err != nil {
			return err
		}
	}
	if l.cfg.Dir, err = filepath.Abs(l.cfg.Dir); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if l.cluster, l.problems, err = Read(l.cfg.Dir); err != nil {
		return err
	}
	topology, err := Plan(l.cluster, l.cfg.Options)
	if err != nil {
		return err
	}
	if l.world, err = build(topology); err != nil {
		return err
	}
	if l.unname, err = l.nameServices(); err != nil {
		// Addresses do as well; a host without /etc/hosts is no reason to fail.
		l.cfg.Logger.Warn("programs in the lab will not find Services by name", "err", err)
	}
	for i := range l.cluster.Pods {
		p := &pod{lab: l, Pod: &l.cluster.Pods[i], space: l.world.spaces[PodSpace(l.cluster.Pods[i].Namespace, l.cluster.Pods[i].Name)]}
		l.pods[p.ID()] = p
		if err := p.launch(ctx); err != nil {
			return fmt.Errorf("lab: starting pod %s: %w", p.ID(), err)
		}
	}
	if l.cfg.NoProxy {
		return nil
	}
	for i := range l.cluster.Nodes {
		if err := l.StartNode(l.cluster.Nodes[i].Name); err != nil {
			return err
		}
	}
	return nil
}

// StartNode runs "kptrace proxy" in a node's namespace, or an agent and the proxy
// beside it, what of them does not run. Start did so for all nodes; it is for one
// whose program has ended, see Ended.
func (l *Lab) StartNode(name string) error {
	if !l.cfg.Beside {
		return l.startNode(name, name, append([]string{"proxy", "--socket", l.NodeSocket(name)}, l.cfg.ProxyArgs...))
	}
	// What it owns is not the agent's, hence a folder of its own.
	dir := filepath.Join(l.cfg.SocketDir, besideDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("lab: starting node %s: %w", name, err)
	}
	err := l.startNode(name, besideKey(name), append([]string{"proxy", "--trace=false", "--healthz-bind-address", "127.0.0.1:10256", "--socket", filepath.Join(dir, name+".sock")}, l.cfg.ProxyArgs...))
	if err != nil {
		return err
	}
	return l.startNode(name, name, []string{"agent", "--iptables-flavour", l.flavour(), "--socket", l.NodeSocket(name)})
}

// besideKey names the proxy of a node beside which an agent runs.
func besideKey(node string) string { return node + " (kube-proxy)" }

// mode is the mode that was asked for.
func (l *Lab) mode() proxy.Mode {
	if i := slices.Index(l.cfg.ProxyArgs, "--mode"); i >= 0 && i+1 < len(l.cfg.ProxyArgs) {
		return proxy.Mode(l.cfg.ProxyArgs[i+1])
	}
	return proxy.IPTables
}

// flavour is the flavour of iptables that was asked for.
func (l *Lab) flavour() string {
	if i := slices.Index(l.cfg.ProxyArgs, "--iptables-flavour"); i >= 0 && i+1 < len(l.cfg.ProxyArgs) {
		return l.cfg.ProxyArgs[i+1]
	}
	return "auto"
}

// startNode runs a program of a node, unless it runs already.
func (l *Lab) startNode(name, key string, args []string) error {
	sp, ok := l.world.spaces[NodeSpace(name)]
	if !ok {
		return fmt.Errorf("lab: no node %s", name)
	}
	args = append(append([]string{}, l.cfg.Self[1:]...), args...)
	spec := exec.Spec{
		Path: l.cfg.Self[0], Argv0: "kptrace", Args: append(args, "--manifests", l.cfg.Dir, "--node", name),
		Netns: sp.ns.Fd(), OwnGroup: true,
	}
	if l.cfg.Output != nil {
		spec.Stderr = &prefixer{out: l.cfg.Output, prefix: key + ": "}
	}
	l.nodesMu.Lock()
	defer l.nodesMu.Unlock()
	select {
	case <-l.closing:
		return errClosed
	default:
	}
	if p := l.nodes[key]; p != nil {
		select {
		case <-p.Done():
		default:
			return nil
		}
	}
	p, err := exec.Start(spec)
	if err != nil {
		return fmt.Errorf("lab: starting %s: %w", key, err)
	}
	l.nodes[key] = p
	l.watchers.Go(func() {
		end := NodeEnd{Node: name, Err: p.Wait()}
		select {
		case <-l.closing:
		case l.failed <- end:
		}
	})
	return nil
}

// Cluster returns what was built. It must not be changed.
func (l *Lab) Cluster() *Cluster { return l.cluster }

// Problems returns what could not be built.
func (l *Lab) Problems() []proxy.Problem { return l.problems }

// NodeSocket is the path at which a node answers follow, show and status.
func (l *Lab) NodeSocket(node string) string {
	return filepath.Join(l.cfg.SocketDir, node+".sock")
}

// Ended delivers each node whose proxy ended by itself.
func (l *Lab) Ended() <-chan NodeEnd { return l.failed }

// Dir is the folder of manifests.
func (l *Lab) Dir() string { return l.cfg.Dir }

// StartTraffic lets all clients begin, and the planned faults come.
func (l *Lab) StartTraffic(ctx context.Context) error {
	l.faults.Do(l.startFaults)
	return l.orderAll(ctx, order{Do: doStart}, func(p *pod) { p.talking = true })
}

// StopTraffic lets no client begin another connection, and waits for those
// under way to end and be reported.
func (l *Lab) StopTraffic(ctx context.Context) error {
	return l.orderAll(ctx, order{Do: doStop}, func(p *pod) { p.talking = false })
}

func (l *Lab) orderAll(ctx context.Context, o order, note func(*pod)) error {
	errs := make(chan error, len(l.pods))
	for _, p := range l.pods {
		go func() {
			p.mu.Lock()
			note(p)
			link := p.link
			p.mu.Unlock()
			if link == nil || len(p.Traffic) == 0 {
				errs <- nil
				return
			}
			err := link.do(ctx, o)
			if err != nil {
				err = fmt.Errorf("lab: pod %s: %w", p.ID(), err)
			}
			errs <- err
		}()
	}
	var all []error
	for range l.pods {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}

func (l *Lab) report(r *Report) {
	if l.cfg.Report == nil {
		return
	}
	l.reportMu.Lock()
	defer l.reportMu.Unlock()
	l.cfg.Report(*r)
}

// Exec starts a program in the namespace of a pod ("pod/NAMESPACE/NAME") or
// node ("node/NAME"). A Path of "kptrace" is this binary. The program dies
// with the lab.
func (l *Lab) Exec(target string, s exec.Spec) (*exec.Process, error) {
	sp, ok := l.world.spaces[target]
	if !ok || target == lanSpace {
		return nil, fmt.Errorf("lab: nothing here is called %s: there are %s", target, strings.Join(l.Targets(), ", "))
	}
	if s.Path == "kptrace" {
		s.Path, s.Argv0 = l.cfg.Self[0], "kptrace"
		s.Args = append(append([]string{}, l.cfg.Self[1:]...), s.Args...)
	}
	s.Netns = sp.ns.Fd()
	return exec.Start(s)
}

// Do runs f in the namespace of a target, as netns.NS.Do does it: sockets
// that f opens belong to it for good.
func (l *Lab) Do(target string, f func() error) error {
	sp, ok := l.world.spaces[target]
	if !ok {
		return fmt.Errorf("lab: nothing here is called %s", target)
	}
	return sp.ns.Do(f)
}

// Netns is the namespace of a target, which belongs to the lab; nil if there is none.
func (l *Lab) Netns(target string) *netns.NS {
	if sp, ok := l.world.spaces[target]; ok {
		return sp.ns
	}
	return nil
}

// Targets lists what Exec takes: nodes first, then pods.
func (l *Lab) Targets() []string {
	var names []string
	for i := range l.cluster.Nodes {
		names = append(names, NodeSpace(l.cluster.Nodes[i].Name))
	}
	for i := range l.cluster.Pods {
		names = append(names, PodSpace(l.cluster.Pods[i].Namespace, l.cluster.Pods[i].Name))
	}
	return names
}

// Close ends the lab: pods at once, nodes after they had five seconds to end
// in good order. It waits until all are gone.
func (l *Lab) Close() {
	l.close.Do(func() {
		close(l.closing)
		l.nodesMu.Lock() // nobody starts one from here on
		defer l.nodesMu.Unlock()
		for _, p := range l.nodes {
			_ = p.Signal(syscall.SIGCONT) // an incident may have stopped it
			_ = p.Signal(syscall.SIGTERM)
		}
		for _, p := range l.pods {
			p.end()
		}
		deadline := time.After(5 * time.Second)
		for _, p := range l.nodes {
			select {
			case <-p.Done():
			case <-deadline:
				_ = p.Kill()
				<-p.Done()
			}
		}
		_ = l.endWork()
		l.watchers.Wait()
		if l.world != nil {
			l.world.close()
		}
		if l.unname != nil {
			l.unname()
		}
		if l.lock != nil {
			leave(l.cfg.SocketDir, l.lock)
		}
	})
}

// signalGroup sends a signal to a child started with OwnGroup and all of its
// group.
func signalGroup(p *exec.Process, sig syscall.Signal) {
	select {
	case <-p.Done():
	default:
		_ = unix.Kill(-p.PID(), sig)
	}
}

package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kptrace/kptrace/exporters/prom"
	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/proxy/health"
	"github.com/kptrace/kptrace/proxy/serverhealth"
)

// listenPatience is how long the proxy waits for the tracer before it
// programs anything: a moment, because connections that are made earlier have
// no decision to show, and no longer, because Services come first.
const listenPatience = 2 * time.Second

// relayAgain is the wait before a relay that could not listen tries again.
const relayAgain = 5 * time.Second

// keepAgain is the wait before what a full disk did not take is written again.
const keepAgain = 10 * time.Second

// undoPatience bounds the removal of rules at the end.
const undoPatience = 30 * time.Second

// node is one running node.
type node struct {
	cfg     Config
	owner   *owner
	syncer  *proxy.Syncer
	tracer  *tracer // nil without tracing
	paths   *pathTracer
	started time.Time
	variant string
	reason  string

	teller   *teller
	metrics  *prom.Exporter
	findings findings
	lately   lately
	gap      gap
	around   around
	spans    spans
	health   *health.Source
	ports    *health.Servers
	servers  atomic.Pointer[serverhealth.Checker] // nil where nobody checks
}

// Run runs one node until ctx ends, which is no error. It fails at once if
// another kptrace owns this network namespace, if the backend cannot run here,
// or if there is no state to start from.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.StateDir == "" {
		cfg.StateDir = filepath.Dir(cfg.Socket)
	}
	own, err := own(cfg.StateDir)
	if err != nil {
		return err
	}
	defer own.release()
	n := &node{cfg: cfg, owner: own, started: time.Now(), teller: newTeller(&cfg)}
	n.lately.wanted = make(chan struct{}, 1)
	if err := n.preflight(ctx); err != nil {
		return err
	}
	if err := own.beside(n.follows() != nil); err != nil {
		return err
	}
	n.measure()
	if err := n.sysctls(); err != nil {
		return err
	}
	if cfg.Trace {
		n.tracer = newTracer(cfg, n.syncer.Views)
		n.paths = newPathTracer(n)
		n.tracer.wants = n.spans.wants
	}
	if err := n.openSpans(ctx); err != nil {
		return err
	}
	n.teller.started(&n.cfg)
	err = n.run(ctx)
	if cfg.Undo != nil && cfg.Undo() {
		err = errors.Join(err, n.undo(ctx))
	}
	return err
}

func (n *node) preflight(ctx context.Context) error {
	p, ok := n.cfg.Backend.(Preflighter)
	if !ok {
		return nil
	}
	var err error
	if n.variant, n.reason, err = p.Preflight(ctx); err != nil {
		return err
	}
	if n.follows() != nil {
		n.cfg.Logger.Info("watching a kube-proxy", "found", n.reason, "variant", n.variant)
		return nil
	}
	n.cfg.Logger.Info("Using "+string(n.cfg.Backend.Mode())+" Proxier", "variant", n.variant, "because", n.reason)
	return nil
}

// follows is the backend where another proxy programs the Services, else nil.
func (n *node) follows() proxy.Follower {
	f, _ := n.cfg.Backend.(proxy.Follower)
	return f
}

// sysctls makes the settings Services and tracing need. Tracing does without
// those it cannot have; status says which.
func (n *node) sysctls() error {
	if !n.cfg.NoLocalhost {
		if err := n.owner.set("net/ipv4/conf/all/route_localnet", "1"); err != nil {
			return fmt.Errorf("%w: NodePorts on 127.0.0.1 need it", err)
		}
	}
	for _, s := range n.cfg.Sysctls {
		if s.AtLeast {
			if least, _ := strconv.Atoi(s.Value); number(s.Name) >= least {
				continue
			}
		}
		err := n.owner.set(s.Name, s.Value)
		if err != nil && s.Optional && (errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS)) {
			n.cfg.Logger.Warn("left as it is: it belongs to the machine, not to this network namespace", "sysctl", s.Name, "wanted", s.Value, "err", err)
			continue
		}
		if err != nil {
			return err
		}
	}
	if !n.cfg.Trace || n.cfg.ReadOnly {
		return nil
	}
	for _, name := range []string{"nf_conntrack_acct", "nf_conntrack_timestamp"} {
		if err := n.owner.set("net/netfilter/"+name, "1"); err != nil {
			n.cfg.Logger.Warn("tracing without bytes or kernel times", "err", err)
		}
	}
	return nil
}

func (n *node) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	seeing := n.relay(ctx, g)
	listening := make(chan struct{})
	if n.tracer == nil {
		close(listening)
	} else {
		var once sync.Once
		g.Go(func() error {
			n.tracer.run(seeing, func() { once.Do(func() { close(listening) }) })
			return nil
		})
		g.Go(func() error {
			n.answer(seeing)
			return nil
		})
		if !n.cfg.ReadOnly {
			g.Go(func() error {
				n.paths.run(ctx)
				return nil
			})
		}
		if n.cfg.RequestGroup != 0 {
			g.Go(func() error {
				n.readRequests(ctx)
				return nil
			})
		}
	}
	g.Go(func() error {
		select {
		case <-listening:
		case <-time.After(listenPatience):
			n.cfg.Logger.Warn("the tracer is not ready; programming Services without it")
		case <-ctx.Done():
			return nil
		}
		return n.syncer.Run(ctx)
	})
	g.Go(func() error {
		n.watch(ctx)
		return nil
	})
	if f := n.follows(); f != nil {
		g.Go(func() error {
			n.follow(ctx, f)
			return nil
		})
	} else {
		g.Go(func() error {
			n.reconcile(ctx)
			return nil
		})
	}
	g.Go(func() error {
		return n.cfg.State(ctx, func(s *proxy.Snapshot) {
			n.teller.problems(fromState, s.Problems)
			n.metrics.Asked(s)
			n.syncer.Set(s)
		})
	})
	g.Go(func() error {
		n.removeOthers(ctx)
		return nil
	})
	g.Go(func() error {
		n.lookLately(ctx)
		return nil
	})
	n.exportSpans(seeing, g)
	if n.cfg.ServerHealth {
		g.Go(func() error {
			n.checkServers(ctx)
			return nil
		})
	}
	g.Go(func() error {
		if err := guard(func() error { n.reroute(ctx); return nil })(); err != nil {
			n.cfg.Logger.Error("connections that nobody answers stay where they are; Services are not affected", "err", err)
		}
		return nil
	})
	g.Go(func() error {
		n.keep(ctx, keepAgain)
		return nil
	})
	n.serve(ctx, g)
	return g.Wait()
}

// lastWords is how long it takes until what a proxy says at its end has been told.
const lastWords = 250 * time.Millisecond

// relay runs a proxy that relays connections. The context that it returns is for those
// who tell of them: it ends later, for what was relayed ends with the proxy.
func (n *node) relay(ctx context.Context, g *errgroup.Group) context.Context {
	r, ok := n.cfg.Backend.(proxy.Relay)
	if !ok {
		return ctx
	}
	seeing, stop := context.WithCancel(context.WithoutCancel(ctx))
	g.Go(func() error {
		defer stop()
		err := r.Run(ctx)
		if n.tracer != nil && ctx.Err() != nil {
			time.Sleep(lastWords)
		}
		return err
	})
	return seeing
}

// keep sees to it that what sysctls were is written down, until ctx ends.
func (n *node) keep(ctx context.Context, again time.Duration) {
	failed := false
	for ctx.Err() == nil {
		err := n.owner.kept()
		switch {
		case err != nil && !failed:
			n.cfg.Logger.Error("what sysctls were cannot be written down, so after kill -9 nobody could set them back; Services are not affected; trying again", "in", again, "err", err)
		case err == nil && failed:
			n.cfg.Logger.Info("what sysctls were is written down")
		}
		if failed = err != nil; !failed {
			return
		}
		pause(ctx, again)
	}
}

// answer serves questions until ctx ends. Services do not depend on it: what
// goes wrong is said and tried again.
func (n *node) answer(ctx context.Context) {
	for {
		err := guard(func() error { return relay.NewServer(n.relayConfig()).Run(ctx, n.cfg.Socket) })()
		if ctx.Err() != nil {
			return
		}
		n.cfg.Logger.Error("nobody can ask this node; Services are not affected; trying again", "in", relayAgain, "err", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(relayAgain):
		}
	}
}

// undo removes what this node changed.
func (n *node) undo(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoPatience)
	defer cancel()
	err := errors.Join(n.cfg.Backend.Cleanup(ctx), undoPaths(ctx), n.owner.restore())
	if err != nil {
		return fmt.Errorf("node: not everything could be undone, run kptrace cleanup: %w", err)
	}
	n.cfg.Logger.Info("rules removed, sysctls set back")
	return nil
}

// Init makes the settings that need full root and leaves them for a Run with
// less: those of kube-proxy's --init-only.
func Init(cfg Config) error {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.StateDir == "" {
		cfg.StateDir = filepath.Dir(cfg.Socket)
	}
	own, err := own(cfg.StateDir)
	if err != nil {
		return err
	}
	defer own.release()
	return (&node{cfg: cfg, owner: own}).sysctls()
}

// Cleanup undoes what a node that is gone left in this network namespace.
func Cleanup(ctx context.Context, rules Cleaner, stateDir string) error {
	own, err := own(stateDir)
	if err != nil {
		return err
	}
	defer own.release()
	return errors.Join(rules.Cleanup(ctx), undoPaths(ctx), own.restore())
}

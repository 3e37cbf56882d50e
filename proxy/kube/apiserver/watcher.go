package apiserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/kptrace/kptrace/proxy"
)

const (
	defaultSettle   = 20 * time.Millisecond
	defaultNodeWait = 30 * time.Second
	// churn is how many times Settle a Snapshot waits while changes go on.
	churn = 10
	// nameSettle is how long changes wait that only names depend on: pods come
	// and go all the time, and a Snapshot is work for everybody.
	nameSettle = time.Second
	// loadWait bounds Load.
	loadWait = 30 * time.Second
)

// Watcher follows an API server.
type Watcher struct {
	cfg    Config
	server string
	client kubernetes.Interface
	state  *state
	health *health
	all    resources
}

// New makes a Watcher; Run starts it. It fails if nothing says how to reach an
// API server; whether there is one is not asked.
func New(cfg Config) (*Watcher, error) {
	if cfg.Settle == 0 {
		cfg.Settle = defaultSettle
	}
	if cfg.NodeWait == 0 {
		cfg.NodeWait = defaultNodeWait
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	w := &Watcher{cfg: cfg, client: cfg.client, server: "in a test"}
	if w.client == nil {
		rc, err := cfg.RESTConfig()
		if err != nil {
			return nil, err
		}
		w.server = rc.Host
		if w.client, err = kubernetes.NewForConfig(rc); err != nil {
			return nil, fmt.Errorf("apiserver: reading how to reach it: %w", err)
		}
	}
	w.state = newState(cfg.NodeName)
	w.health = newHealth(cfg.Logger, w.state.wake)
	w.all = newResources(w.client, w.state)
	return w, nil
}

// Source says where Snapshots come from, as "api server https://10.0.0.1:6443".
func (w *Watcher) Source() string { return "api server " + w.server }

// Notes says what is not as it could be: an outage, and what is missing because
// access rules refuse it. Each is a sentence without full stop.
func (w *Watcher) Notes() []string {
	var notes []string
	since, meanwhile, err := w.health.outage()
	if !since.IsZero() {
		notes = append(notes, fmt.Sprintf("the API server is unreachable since %s, %s: %v",
			since.Format("2006-01-02 15:04:05"), meanwhile, err))
	}
	for _, r := range []*resource{w.all.services, w.all.slices, w.all.own, w.all.pods, w.all.nodes} {
		switch c, err := w.health.answer(r); {
		case c == refused && r.required:
			notes = append(notes, fmt.Sprintf("the API server refuses access to %s, %s: %v", r.name, meanwhile, err))
		case c == refused:
			notes = append(notes, r.without)
		case c == failing && since.IsZero():
			notes = append(notes, fmt.Sprintf("the API server does not say its %s: %v", r.name, err))
		}
	}
	return notes
}

// UID returns the UID of a Service, EndpointSlice or Pod that the Watcher knows,
// empty for all others. Of a Pod it knows what EndpointSlices name, if it may not
// see Pods. It may be called at any time.
func (w *Watcher) UID(o proxy.ObjectRef) types.UID {
	key := o.Namespace + "/" + o.Name
	s := w.state
	s.mu.Lock()
	defer s.mu.Unlock()
	switch o.Kind {
	case "Service":
		if x := s.services[key]; x != nil {
			return x.UID
		}
	case "EndpointSlice":
		if x := s.slices[key]; x != nil {
			return x.UID
		}
	case "Pod":
		if x := s.pods.records[key]; x != nil {
			return x.uid
		}
		for _, x := range s.slices {
			for i := range x.Endpoints {
				if r := x.Endpoints[i].TargetRef; r != nil && r.Kind == "Pod" && r.Name == o.Name && cmp.Or(r.Namespace, x.Namespace) == o.Namespace {
					return r.UID
				}
			}
		}
	}
	return ""
}

// Load returns one Snapshot of the cluster as it is now, with the names of pods
// where they may be seen. It is called once, and not beside Run.
func (w *Watcher) Load(ctx context.Context) (*proxy.Snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, loadWait)
	defer cancel()
	var snap *proxy.Snapshot
	err := w.run(ctx, time.Second, true, func(s *proxy.Snapshot) { snap = s; cancel() })
	switch {
	case err != nil || snap != nil:
		return snap, err
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return nil, fmt.Errorf("apiserver: nothing to start from within %v: %s", loadWait, strings.Join(w.Notes(), "; "))
	}
	return nil, ctx.Err()
}

// Run hands emit a Snapshot once Services and EndpointSlices are known in full
// and this node's addresses are known or were waited for, and another whenever
// something is different, until ctx ends, which is no error. An API server that
// cannot be reached is tried until it can be. Run is called once.
func (w *Watcher) Run(ctx context.Context, emit func(*proxy.Snapshot)) error {
	return w.run(ctx, w.cfg.NodeWait, false, emit)
}

// run is Run; nodeWait bounds the wait for the node's addresses and, with names, for
// the pods' names before the first Snapshot.
func (w *Watcher) run(ctx context.Context, nodeWait time.Duration, names bool, emit func(*proxy.Snapshot)) error {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	start := func(r *resource) { running.Go(func() { w.follow(ctx, r) }) }
	for _, r := range []*resource{w.all.services, w.all.slices, w.all.own, w.all.ranges, w.all.pods} {
		start(r)
	}
	if !w.wait(ctx, nodeWait, names) {
		return nil
	}
	others := false // whoever may see pods is likely to be meant to see nodes
	send := func() {
		if s := w.state.snapshot(); s != nil {
			w.health.serves()
			emit(s)
		}
		if !others && w.synced(w.all.pods) {
			others = true
			start(w.all.nodes)
		}
	}
	send()
	w.loop(ctx, send)
	return nil
}

// wait returns true when there is enough for a first Snapshot, false when ctx
// ended before.
func (w *Watcher) wait(ctx context.Context, nodeWait time.Duration, names bool) bool {
	patience := time.NewTimer(nodeWait)
	defer patience.Stop()
	over := false
	for {
		if w.synced(w.all.services) && w.synced(w.all.slices) && (over || w.knowsNode() && (!names || w.knowsNames())) {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-w.state.changed:
		case <-patience.C:
			over = true
			if w.knowsNode() {
				continue
			}
			w.cfg.Logger.Warn("api server: this node's addresses are unknown; going on without", "node", w.cfg.NodeName, "waited", nodeWait)
		}
	}
}

func (w *Watcher) synced(r *resource) bool {
	w.state.mu.Lock()
	defer w.state.mu.Unlock()
	return r.table.synced
}

// knowsNode reports whether this node's addresses are known, or cannot be.
func (w *Watcher) knowsNode() bool {
	if c, _ := w.health.answer(w.all.own); c == refused {
		return true
	}
	w.state.mu.Lock()
	defer w.state.mu.Unlock()
	return w.state.own != nil && len(w.state.own.node.Addrs) > 0
}

// knowsNames reports whether the pods' names are known, or cannot be.
func (w *Watcher) knowsNames() bool {
	c, _ := w.health.answer(w.all.pods)
	return c == refused || c == absent || w.synced(w.all.pods)
}

// loop calls send when changes have settled, until ctx ends.
func (w *Watcher) loop(ctx context.Context, send func()) {
	settle, names := time.NewTimer(0), time.NewTimer(0)
	settle.Stop()
	names.Stop()
	defer settle.Stop()
	defer names.Stop()
	var first time.Time // of the changes that wait
	naming := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.state.changed:
			now := time.Now()
			if first.IsZero() {
				first = now
			}
			// Once it is due, further changes do not move it.
			if left := first.Add(churn * w.cfg.Settle).Sub(now); left > 0 {
				settle.Reset(min(w.cfg.Settle, left))
			}
			continue
		case <-w.state.named:
			if !naming {
				naming = true
				names.Reset(nameSettle)
			}
			continue
		case <-settle.C:
		case <-names.C:
		}
		first, naming = time.Time{}, false
		settle.Stop()
		names.Stop()
		send()
	}
}

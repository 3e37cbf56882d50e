package node

import (
	"fmt"
	"log/slog"
	"strings"
	"sync"

	"github.com/kptrace/kptrace/proxy"
)

// Words of kube-proxy's own Events, and ours beside them.
const (
	actionStart   = "StartKubeProxy"
	actionListen  = "Listen"
	actionProgram = "Program"

	reasonStarting    = "Starting"
	reasonHealthz     = "FailedToStartProxierHealthcheck"
	reasonMetrics     = "FailedToStartMetricServer"
	reasonServicePort = "FailedToStartServiceHealthcheck"
	reasonFallback    = "ProxyModeFallback"
	reasonRefused     = "FailedToProgramService"
	reasonInvalid     = "Invalid" // and the kind of the object
)

// What is served over HTTP.
const (
	whatHealthz = "healthz"
	whatMetrics = "metrics"
)

// teller says what people should know, in the log and, where there is an API
// server, by Kubernetes Events.
type teller struct {
	node   string
	logger *slog.Logger
	events func(proxy.ObjectEvent) // nil without an API server

	mu    sync.Mutex
	known map[string]map[string]bool // problems by who said them
}

func newTeller(cfg *Config) *teller {
	return &teller{node: cfg.Name, logger: cfg.Logger, events: cfg.Events, known: map[string]map[string]bool{}}
}

// atNode records an Event of this node.
func (t *teller) atNode(kind proxy.EventType, reason, action, note string) {
	t.record(proxy.ObjectEvent{Object: proxy.ObjectRef{Kind: "Node", Name: t.node}, Type: kind, Reason: reason, Action: action, Note: note})
}

func (t *teller) record(e proxy.ObjectEvent) {
	if t.events != nil {
		t.events(e)
	}
}

// started says that the node begins to work, and whether in the mode that was
// asked for.
func (t *teller) started(cfg *Config) {
	if _, beside := cfg.Backend.(proxy.Follower); beside {
		return // the other proxy speaks for itself
	}
	mode := cfg.Backend.Mode()
	t.atNode(proxy.EventNormal, reasonStarting, actionStart, fmt.Sprintf("kptrace %s in the place of kube-proxy, mode %s", cfg.Version, mode))
	if cfg.Wanted != "" && cfg.Wanted != mode {
		t.atNode(proxy.EventWarning, reasonFallback, actionStart, fmt.Sprintf("mode %s was asked for and cannot run: %s; using %s", cfg.Wanted, cfg.Fallback, mode))
	}
}

// notServing says that an address could not be bound.
func (t *teller) notServing(what string, err error) {
	reason := reasonMetrics
	if what == whatHealthz {
		reason = reasonHealthz
	}
	t.atNode(proxy.EventWarning, reason, actionStart, err.Error())
}

// healthPort says that a Service's health port could not be opened here. It is
// in the log already.
func (t *teller) healthPort(p proxy.Problem) {
	t.problem(p, reasonServicePort, actionListen, false)
}

// problems says what is new in a list of problems that from has, and what of
// the last one is mended.
func (t *teller) problems(from string, list []proxy.Problem) {
	t.mu.Lock()
	defer t.mu.Unlock()
	known := t.known[from]
	now := make(map[string]bool, len(list))
	for _, p := range list {
		key := p.Error()
		if from == fromKernel {
			key = p.Object // what it says of one fault differs from try to try
		}
		if now[key] || known[key] {
			now[key] = true
			continue
		}
		now[key] = true
		t.logger.Error("problem: " + p.Error())
		ref, _ := proxy.ParseObjectRef(p.Object)
		reason, shared := reasonInvalid+ref.Kind, true
		if from == fromKernel {
			reason, shared = reasonRefused, false
		}
		t.problem(p, reason, actionProgram, shared)
	}
	for key := range known {
		if !now[key] {
			t.logger.Info("mended: " + key)
		}
	}
	t.known[from] = now
}

// Who finds problems: those who read objects, those who make rules of them, and
// the kernel.
const (
	fromState   = "state"
	fromProgram = "program"
	fromKernel  = "kernel"
)

// problem records the Event of a problem, if it is one of an object.
func (t *teller) problem(p proxy.Problem, reason, action string, shared bool) {
	ref, ok := proxy.ParseObjectRef(p.Object)
	if !ok {
		return
	}
	note := p.Message
	if p.Field != "" {
		note = p.Field + ": " + note
	}
	t.record(proxy.ObjectEvent{
		Object: ref, Type: proxy.EventWarning, Reason: reason, Action: action, Note: strings.TrimSpace(note), Shared: shared,
	})
}

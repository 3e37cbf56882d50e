// Package events tells the owners of Services and pods of failures that
// persist, by Kubernetes Events: what kubectl describe shows. One connection
// that failed is no event; most connections to an endpoint failing for minutes
// is one, and so is its end.
package events

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// Config says what persists. Zero values mean the defaults.
type Config struct {
	// Record takes the events. It must not wait, and limits their rate itself.
	Record func(proxy.ObjectEvent)
	// Window is the time over which connections are counted, 1 min, and
	// Windows how many in a row must be bad, 3.
	Window  time.Duration
	Windows int
	// Least is how many connections must fail in a window, 5, and Share which
	// part of all to that endpoint that must be, 0.5.
	Least int
	Share float64
}

const (
	// drainEvery is how often flows are taken from the ring; nobody waits for
	// it in between, so its writer wakes nobody up.
	drainEvery = 200 * time.Millisecond
	// maxKeys bounds what is counted in a window. What is over is left out.
	maxKeys = 10_000
	// quietMost is after how many windows without connections a failure that
	// was told of is forgotten.
	quietMost = 60
	// action is what was tried when it failed, for machines.
	action = "Connect"
	// recovered is the reason of an event that says that it is over.
	recovered = "ConnectionsRecovered"
)

// Exporter watches connections.
type Exporter struct {
	cfg Config
	// totals and failures are of the current window; streaks lists in how
	// many windows in a row a failure was there.
	totals   map[target]int
	failures map[failure]int
	streaks  map[failure]streak
}

// streak is in how many windows in a row a failure was there, and how many
// quiet ones came after it.
type streak struct{ bad, quiet int }

// target is an endpoint of a Service, or the Service where none was picked.
type target struct {
	service        proxy.PortName
	endpoint       netip.AddrPort
	namespace, pod string
}

type failure struct {
	target
	reason trace.Reason
}

// New makes an Exporter that has seen nothing.
func New(cfg Config) *Exporter {
	cfg.Window = cmp.Or(cfg.Window, time.Minute)
	cfg.Windows = cmp.Or(cfg.Windows, 3)
	cfg.Least = cmp.Or(cfg.Least, 5)
	cfg.Share = cmp.Or(cfg.Share, 0.5)
	return &Exporter{
		cfg: cfg, totals: map[target]int{}, failures: map[failure]int{}, streaks: map[failure]streak{},
	}
}

// Run watches what r brings until ctx ends, which is no error.
func (e *Exporter) Run(ctx context.Context, r *trace.Reader) error {
	drain, window := time.NewTicker(drainEvery), time.NewTicker(e.cfg.Window)
	defer drain.Stop()
	defer window.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-drain.C:
			for flows, lost := r.Poll(); len(flows) > 0 || lost > 0; flows, lost = r.Poll() {
				for _, f := range flows {
					e.add(f)
				}
			}
			r.Losses() // others tell of them
		case <-window.C:
			for _, event := range e.over() {
				e.cfg.Record(event)
			}
		}
	}
}

// add counts a connection that has ended, by the endpoints that were tried.
func (e *Exporter) add(f *trace.Flow) {
	if !f.Completed || f.Service.Name.Name == "" {
		return
	}
	if len(f.Attempts) == 0 {
		e.count(target{service: f.Service.Name}, f.Outcome.Failed(), f.Reason)
		return
	}
	for i := range f.Attempts {
		a := &f.Attempts[i]
		to := target{f.Service.Name, a.Endpoint.Addr, a.Endpoint.Namespace, a.Endpoint.Pod}
		if i == len(f.Attempts)-1 {
			// The client's own doing is nobody's failure.
			e.count(to, f.Outcome.Failed() && f.Reason != trace.ResetByClient, f.Reason)
			continue
		}
		switch a.Outcome {
		case "refused":
			e.count(to, true, trace.EndpointRefused)
		case "unreachable":
			e.count(to, true, trace.Unreachable)
		case "timeout", "unanswered":
			e.count(to, true, trace.SynUnanswered)
		}
	}
}

func (e *Exporter) count(to target, failed bool, why trace.Reason) {
	if _, known := e.totals[to]; !known && len(e.totals) >= maxKeys {
		return
	}
	e.totals[to]++
	if failed {
		e.failures[failure{to, why}]++
	}
}

// over ends a window and returns what is to be told.
func (e *Exporter) over() []proxy.ObjectEvent {
	var told []proxy.ObjectEvent
	next := map[failure]streak{}
	for what, n := range e.failures {
		if n < e.cfg.Least || float64(n) < e.cfg.Share*float64(e.totals[what.target]) {
			continue
		}
		bad := e.streaks[what].bad + 1
		next[what] = streak{bad: bad}
		if bad%e.cfg.Windows == 0 {
			told = append(told, what.events()...)
		}
	}
	for what, s := range e.streaks {
		n := e.totals[what.target]
		if !what.endpoint.IsValid() {
			n = e.served(what.service)
		}
		switch {
		case next[what].bad > 0 || s.bad < e.cfg.Windows:
		case n < e.cfg.Least:
			// Too quiet to say that it is over; the endpoint may be gone.
			if s.quiet++; s.quiet < quietMost && len(next) < maxKeys {
				next[what] = s
			}
		default:
			told = append(told, what.end())
		}
	}
	e.streaks = next
	clear(e.totals)
	clear(e.failures)
	slices.SortFunc(told, func(a, b proxy.ObjectEvent) int {
		return cmp.Or(strings.Compare(a.Object.String(), b.Object.String()), strings.Compare(a.Reason, b.Reason), strings.Compare(a.Note, b.Note))
	})
	return told
}

// served is how many connections to a Service got an endpoint: where there was
// none before, these say that it is over.
func (e *Exporter) served(service proxy.PortName) (n int) {
	for to, count := range e.totals {
		if to.service == service && to.endpoint.IsValid() {
			n += count
		}
	}
	return n
}

// events tells of a failure at the Service, and at the pod if it is about one.
// The words are the same on all nodes, so that one event stands for all.
func (x *failure) events() []proxy.ObjectEvent {
	note := fmt.Sprintf("most connections to %s fail", x.service)
	if x.endpoint.IsValid() {
		note = fmt.Sprintf("most connections to %s that get %s fail", x.service, x.who())
	}
	for _, info := range trace.Reasons() {
		if info.Code == x.reason {
			note += ": " + info.Sentence + " " + info.Next
		}
	}
	event := proxy.ObjectEvent{
		Object: proxy.ObjectRef{Kind: "Service", Namespace: x.service.Namespace, Name: x.service.Name},
		Type:   proxy.EventWarning, Reason: camel(x.reason), Action: action, Note: note, Shared: true,
	}
	list := []proxy.ObjectEvent{event}
	if x.pod != "" {
		event.Object = proxy.ObjectRef{Kind: "Pod", Namespace: x.namespace, Name: x.pod}
		list = append(list, event)
	}
	return list
}

// end tells that it is over, at the Service.
func (x *failure) end() proxy.ObjectEvent {
	note := fmt.Sprintf("connections to %s work again", x.service)
	if x.endpoint.IsValid() {
		note = fmt.Sprintf("connections to %s that get %s work again", x.service, x.who())
	}
	return proxy.ObjectEvent{
		Object: proxy.ObjectRef{Kind: "Service", Namespace: x.service.Namespace, Name: x.service.Name},
		Type:   proxy.EventNormal, Reason: recovered, Action: action, Note: note, Shared: true,
	}
}

func (x *failure) who() string {
	if x.pod == "" {
		return x.endpoint.String()
	}
	return fmt.Sprintf("pod %s (%s)", x.pod, x.endpoint)
}

// camel makes "EndpointRefused" of "endpoint-refused", as reasons of Events are
// written.
func camel(r trace.Reason) string {
	if r == trace.NoReason {
		return "ConnectionsFailed"
	}
	out := ""
	for word := range strings.SplitSeq(string(r), "-") {
		if word != "" {
			out += strings.ToUpper(word[:1]) + word[1:]
		}
	}
	return out
}

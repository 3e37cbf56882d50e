package apiserver

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// condition is how far a resource can be had.
type condition int

const (
	unknown condition = iota
	fine
	// Access rules refuse; an API server that does not know the resource is
	// absent; everything else is failing.
	refused
	absent
	failing
)

// health says how the API server answers, and logs when that changes: an
// outage is two lines, however often it is tried.
type health struct {
	logger *slog.Logger
	wake   func()

	mu     sync.Mutex
	now    map[*resource]condition
	errs   map[*resource]error
	since  time.Time // of an outage, zero if there is none
	served bool      // a Snapshot was emitted
}

func newHealth(logger *slog.Logger, wake func()) *health {
	return &health{logger: logger, wake: wake, now: map[*resource]condition{}, errs: map[*resource]error{}}
}

// judge tells what the answer to a list or a watch means.
func judge(verb string, err error) condition {
	switch {
	case err == nil:
		return fine
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return refused
	case apierrors.IsNotFound(err), apierrors.IsMethodNotSupported(err):
		return absent
	case apierrors.IsResourceExpired(err), apierrors.IsGone(err), apierrors.HasStatusCause(err, metav1.CauseTypeResourceVersionTooLarge):
		return unknown // client-go lists anew
	case verb == "watch" && (apierrors.IsInvalid(err) || apierrors.IsBadRequest(err)):
		return unknown // an API server that cannot stream lists; client-go lists
	}
	return failing
}

// note takes an answer to a request for r.
func (h *health) note(ctx context.Context, verb string, r *resource, err error) {
	if ctx.Err() != nil {
		return
	}
	c := judge(verb, err)
	if err != nil {
		h.logger.Debug("api server: no answer", "verb", verb, "resource", r.name, "err", err)
	}
	if c == unknown {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	before := h.now[r]
	h.now[r], h.errs[r] = c, err
	switch {
	case c == before:
	case c == refused && r.required:
		h.logger.Error("api server: access is refused; the last state stays in force", "resource", r.name, "err", err)
	case c == refused, c == absent:
		h.logger.Info("api server: doing without", "resource", r.name, "note", r.without, "err", err)
	case before == refused:
		h.logger.Info("api server: access is granted", "resource", r.name)
	}
	if c != before {
		h.wake()
	}
	h.outage(err)
}

// outage finds where an outage begins and ends.
func (h *health) outage(err error) {
	down := slices.Contains(h.values(), failing)
	switch {
	case down && h.since.IsZero():
		h.since = time.Now()
		then := "the last state stays in force"
		if !h.served {
			then = "nothing is programmed before it answers"
		}
		h.logger.Warn("api server: unreachable; "+then, "err", err)
	case !down && !h.since.IsZero():
		h.logger.Info("api server: it answers again", "after", time.Since(h.since).Round(time.Millisecond))
		h.since = time.Time{}
	}
}

func (h *health) values() []condition {
	var all []condition
	for _, c := range h.now {
		all = append(all, c)
	}
	return all
}

// of returns how r was answered last, and the error if it was one.
func (h *health) of(r *resource) (condition, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.now[r], h.errs[r]
}

// down returns since when the API server is unreachable, and why.
func (h *health) down() (time.Time, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for r, c := range h.now {
		if c == failing {
			return h.since, h.errs[r]
		}
	}
	return time.Time{}, nil
}

func (h *health) serves() {
	h.mu.Lock()
	h.served = true
	h.mu.Unlock()
}

package apiserver

import (
	"context"
	"errors"
	"log/slog"
	"net/url"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// refusedAfter is how long a right must be refused before it counts as lost:
// an API server that starts refuses everybody until it has read its rules.
const refusedAfter = 15 * time.Second

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

// answers is how requests for one resource are answered.
type answers struct {
	now condition
	err error
	// refused is since when a right that was there is refused.
	refused time.Time
}

// health says how the API server answers, and logs when that changes: an
// outage is two lines, however often it is tried.
type health struct {
	logger *slog.Logger
	wake   func()
	grace  time.Duration

	mu     sync.Mutex
	of     map[*resource]*answers
	since  time.Time // of an outage, zero if there is none
	served bool      // a Snapshot was emitted
}

func newHealth(logger *slog.Logger, wake func()) *health {
	return &health{logger: logger, wake: wake, grace: refusedAfter, of: map[*resource]*answers{}}
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
	var request *url.Error
	if errors.As(err, &request) {
		err = request.Err // the URL is long and known
	}
	if err != nil {
		h.logger.Debug("api server: no answer", "verb", verb, "resource", r.name, "err", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	a := h.of[r]
	if a == nil {
		a = &answers{}
		h.of[r] = a
	}
	if c != refused {
		a.refused = time.Time{}
	}
	switch {
	case c == unknown:
		return
	case c == failing && !r.required && (a.now == refused || a.now == absent):
		return // nothing is known to have changed
	case c == refused && (a.now == fine || a.now == failing):
		if a.refused.IsZero() {
			a.refused = time.Now()
		}
		if time.Since(a.refused) < h.grace {
			return
		}
	}
	before := a.now
	a.now, a.err = c, err
	if c != before {
		h.say(r, before, a)
		h.wake()
	}
}

// say logs what became of r, and where an outage begins and ends.
func (h *health) say(r *resource, before condition, a *answers) {
	switch {
	case a.now == refused && r.required:
		h.logger.Error("api server: access is refused; "+h.meanwhile(), "resource", r.name, "err", a.err)
	case (a.now == refused || a.now == absent) && r.without != "":
		h.logger.Info("api server: doing without "+r.name, "note", r.without, "err", a.err)
	case a.now == fine && before == refused:
		h.logger.Info("api server: access is granted", "resource", r.name)
	}
	down := h.down()
	switch {
	case down != nil && h.since.IsZero():
		h.since = time.Now()
		h.logger.Warn("api server: unreachable; "+h.meanwhile(), "err", a.err)
	case down == nil && !h.since.IsZero():
		h.logger.Info("api server: it answers again", "after", time.Since(h.since).Round(time.Millisecond))
		h.since = time.Time{}
	}
}

// meanwhile says what holds as long as there is no answer.
func (h *health) meanwhile() string {
	if h.served {
		return "the last state stays in force"
	}
	return "nothing is programmed before it answers"
}

// down returns why what Services need cannot be had, nil if it can.
func (h *health) down() error {
	for r, a := range h.of {
		if r.required && a.now == failing {
			return a.err
		}
	}
	return nil
}

// answer returns how r is answered, and the error if it is one.
func (h *health) answer(r *resource) (condition, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if a := h.of[r]; a != nil {
		return a.now, a.err
	}
	return unknown, nil
}

// outage returns since when there is one, zero if there is none, and why.
func (h *health) outage() (since time.Time, meanwhile string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.since, h.meanwhile(), h.down()
}

func (h *health) serves() {
	h.mu.Lock()
	h.served = true
	h.mu.Unlock()
}

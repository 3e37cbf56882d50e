package events

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	typedv1 "k8s.io/client-go/kubernetes/typed/events/v1"
)

// result is what became of a request.
type result int

const (
	written result = iota
	refused        // by access rules
	failed         // for a reason that another try does not mend
	stopped        // our time is over
)

// perRequest bounds one request.
const perRequest = 10 * time.Second

// writer makes one request after the other, as often as it takes.
type writer struct {
	cfg *Config
	// granted says that a request got through the access rules, without that
	// they refuse us until then.
	granted bool
	without time.Time
}

// write does a request until it is answered for good or ctx ends.
func (w *writer) write(ctx context.Context, do func(context.Context) error) result {
	if time.Now().Before(w.without) {
		return refused
	}
	retry, began := w.cfg.retry, time.Now()
	for {
		try, cancel := context.WithTimeout(ctx, perRequest)
		err := do(try)
		cancel()
		switch {
		case ctx.Err() != nil:
			return stopped
		case err == nil, apierrors.IsAlreadyExists(err): // ours after a lost answer, or another node's
			if !w.granted && !w.without.IsZero() {
				w.cfg.Logger.Info("events: access is granted")
			}
			w.granted, w.without = true, time.Time{}
			return written
		case denied(err):
			if time.Since(began) < w.cfg.refusedAfter && w.without.IsZero() {
				break
			}
			if w.without.IsZero() {
				w.cfg.Logger.Warn("events: access is refused; going on without Kubernetes Events: grant create, patch and update on events", "err", err)
			}
			w.granted, w.without = false, time.Now().Add(w.cfg.refusedAgain)
			return refused
		case final(err):
			w.cfg.Logger.Debug("events: the API server does not take an Event", "err", err)
			return failed
		}
		select {
		case <-ctx.Done():
			return stopped
		case <-time.After(retry):
		}
		retry = min(2*retry, w.cfg.retryMost)
	}
}

// denied reports whether access rules stand in the way. A namespace that is
// being deleted takes nothing either, and that is no matter of rights.
func denied(err error) bool {
	return (apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err)) && !apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause)
}

// final reports whether an answer will be the same next time.
func final(err error) bool {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return false // no answer at all
	}
	code := status.Status().Code
	return code >= 400 && code < 500 && !apierrors.IsTooManyRequests(err) && !apierrors.IsTimeout(err)
}

// patch writes the count of a series. An Event that has expired is written
// anew.
func patch(ctx context.Context, client typedv1.EventsV1Interface, e *eventsv1.Event) error {
	body, err := json.Marshal(map[string]any{"series": e.Series})
	if err != nil {
		return fmt.Errorf("events: writing a series: %w", err)
	}
	_, err = client.Events(e.Namespace).Patch(ctx, e.Name, types.StrategicMergePatchType, body, metav1.PatchOptions{})
	if apierrors.IsNotFound(err) {
		_, err = client.Events(e.Namespace).Create(ctx, e, metav1.CreateOptions{})
	}
	return err
}

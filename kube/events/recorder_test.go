package events

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"github.com/kptrace/kptrace/proxy"
)

func warning(name, note string) proxy.ObjectEvent {
	return proxy.ObjectEvent{
		Object: proxy.ObjectRef{Kind: "Service", Namespace: "shop", Name: name},
		Type:   proxy.EventWarning, Reason: "InvalidService", Action: "Program", Note: note,
	}
}

// world is a Recorder at work beside an API server that answers as told.
type world struct {
	*Recorder
	client *fake.Clientset

	mu     sync.Mutex
	answer error // what creating is answered with
	tries  int
	log    strings.Builder
}

func (w *world) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.Write(p)
}

func (w *world) answers(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answer = err
}

func newWorld(t *testing.T, cfg Config) *world {
	t.Helper()
	w := &world{client: fake.NewClientset()}
	w.client.PrependReactor("create", "events", func(k8stesting.Action) (bool, runtime.Object, error) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.tries++
		return w.answer != nil, nil, w.answer
	})
	cfg.Client, cfg.Controller, cfg.Instance = w.client.EventsV1(), "kube-proxy", "node1"
	cfg.Logger = slog.New(slog.NewTextHandler(w, nil))
	cfg.retry, cfg.retryMost, cfg.tick = time.Millisecond, time.Millisecond, 5*time.Millisecond
	w.Recorder = New(cfg)
	return w
}

func (w *world) run(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// until waits for Events of which ok holds.
func (w *world) until(t *testing.T, what string, ok func([]eventsv1.Event) bool) []eventsv1.Event {
	t.Helper()
	var items []eventsv1.Event
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		list, err := w.client.EventsV1().Events(metav1.NamespaceAll).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if items = list.Items; ok(items) {
			return items
		}
	}
	t.Fatalf("no %s; stats %+v; Events %+v", what, w.Stats(), items)
	return nil
}

func count(n int) func([]eventsv1.Event) bool {
	return func(l []eventsv1.Event) bool { return len(l) == n }
}

// TestRecord writes one Event, with all that kubectl describe looks for, and
// counts what repeats it.
func TestRecord(t *testing.T) {
	w := newWorld(t, Config{UID: func(r proxy.ObjectRef) types.UID { return types.UID("uid of " + r.String()) }})
	w.Record(warning("foo", "spec.externalIPs[0]: no address"))
	w.run(t)
	e := w.until(t, "Event", count(1))[0]
	if r := e.Regarding; r.Kind != "Service" || r.Namespace != "shop" || r.Name != "foo" || r.UID != "uid of Service shop/foo" || r.APIVersion != "v1" {
		t.Errorf("regarding %+v", r)
	}
	if e.Namespace != "shop" || e.Type != "Warning" || e.Reason != "InvalidService" || e.Action != "Program" ||
		e.Note != "spec.externalIPs[0]: no address" || e.ReportingController != "kube-proxy" || e.ReportingInstance != "kube-proxy-node1" ||
		e.Series != nil || e.EventTime.IsZero() {
		t.Errorf("Event %+v", e)
	}
	w.Record(warning("foo", "spec.externalIPs[0]: no address"))
	w.Record(warning("foo", "spec.externalIPs[0]: no address"))
	w.until(t, "series of three", func(l []eventsv1.Event) bool {
		return len(l) == 1 && l[0].Series != nil && l[0].Series.Count == 3 && !l[0].Series.LastObservedTime.IsZero()
	})
	w.Record(warning("foo", "spec.ports[0]: another fault of the same object"))
	w.until(t, "second Event", count(2))
	w.Record(proxy.ObjectEvent{Object: proxy.ObjectRef{Kind: "Node", Name: "node1"}, Type: proxy.EventNormal, Reason: "Starting", Action: "StartKubeProxy"})
	for _, e := range w.until(t, "Event of the Node", count(3)) {
		if e.Regarding.Kind == "Node" && (e.Namespace != "default" || e.Regarding.UID != "node1") {
			t.Errorf("Event of the Node: %+v", e)
		}
	}
	if s := w.Stats(); s.Written != 3 || s.Repeated != 2 || s.Limited+s.Dropped+s.Refused+s.Failed != 0 {
		t.Errorf("stats %+v", s)
	}
}

// TestExpired continues a series whose Event the API server has dropped.
func TestExpired(t *testing.T) {
	w := newWorld(t, Config{})
	w.run(t)
	w.Record(warning("foo", "x"))
	e := w.until(t, "Event", count(1))[0]
	if err := w.client.EventsV1().Events("shop").Delete(t.Context(), e.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	w.Record(warning("foo", "x"))
	w.until(t, "series", func(l []eventsv1.Event) bool { return len(l) == 1 && l[0].Series != nil && l[0].Series.Count == 2 })
}

// TestShared lets two nodes say the same: one Event.
func TestShared(t *testing.T) {
	w := newWorld(t, Config{UID: func(proxy.ObjectRef) types.UID { return "1" }})
	w.run(t)
	cfg := w.cfg
	cfg.Instance = "node2"
	other := &world{Recorder: New(cfg)}
	other.run(t)
	for _, note := range []string{"a", "b"} {
		e := warning("foo", note)
		e.Shared = true
		w.Record(e)
		other.Record(e)
	}
	w.until(t, "two Events", func(l []eventsv1.Event) bool {
		return len(l) == 2 && w.Stats().Written == 2 && other.Stats().Written == 2
	})
}

// TestLimits bounds what one object and all together can cause.
func TestLimits(t *testing.T) {
	w := newWorld(t, Config{Burst: 12, ObjectBurst: 5, Rate: 1e-6, ObjectRate: 1e-6})
	for i := range 20 {
		w.Record(warning("noisy", fmt.Sprint(i)))
	}
	if s := w.Stats(); s.Limited != 15 {
		t.Errorf("of 20 at one object %d were held back, want 15", s.Limited)
	}
	for i := range 20 {
		w.Record(warning(fmt.Sprint("svc", i), "x"))
	}
	if s := w.Stats(); s.Limited != 15+13 {
		t.Errorf("of 20 more at others %d were held back, want 13", s.Limited-15)
	}
	w.run(t)
	w.until(t, "12 Events", count(12))
}

// TestQueue never waits, whatever the API server does.
func TestQueue(t *testing.T) {
	w := newWorld(t, Config{Burst: 1e6})
	for i := range maxQueue + 100 { // nobody writes
		w.Record(warning(fmt.Sprint("svc", i), "x"))
	}
	if s := w.Stats(); s.Dropped != 100 {
		t.Errorf("%+v, want 100 dropped", s)
	}
}

// TestOutage loses nothing while the API server is away.
func TestOutage(t *testing.T) {
	w := newWorld(t, Config{})
	w.answers(errors.New("connection refused"))
	w.run(t)
	w.Record(warning("foo", "x"))
	w.Record(warning("bar", "x"))
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		w.mu.Lock()
		n := w.tries
		w.mu.Unlock()
		if n > 5 {
			break
		}
	}
	w.answers(nil)
	w.until(t, "two Events", count(2))
}

// TestRefused says once that there is no right, asks rarely, and goes on when it
// is granted.
func TestRefused(t *testing.T) {
	forbidden := apierrors.NewForbidden(schema.GroupResource{Group: "events.k8s.io", Resource: "events"}, "", errors.New("no"))
	w := newWorld(t, Config{refusedAfter: 20 * time.Millisecond, refusedAgain: 300 * time.Millisecond})
	w.answers(forbidden)
	w.run(t)
	for i := range 8 {
		w.Record(warning(fmt.Sprint("svc", i), "x"))
	}
	for end := time.Now().Add(20 * time.Second); w.Stats().Refused < 8; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("stats %+v", w.Stats())
		}
	}
	w.mu.Lock()
	said := strings.Count(w.log.String(), "access is refused")
	w.mu.Unlock()
	if said != 1 {
		t.Errorf("said %d times:\n%s", said, w.log.String())
	}
	w.answers(nil)
	for i, end := 0, time.Now().Add(20*time.Second); w.Stats().Written == 0; i++ {
		w.Record(warning(fmt.Sprint("later", i), "x"))
		if time.Now().After(end) {
			t.Fatalf("stats %+v", w.Stats())
		}
		time.Sleep(50 * time.Millisecond)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !strings.Contains(w.log.String(), "access is granted") {
		t.Errorf("log:\n%s", w.log.String())
	}
}

// TestNotTaken drops what the API server calls invalid, and goes on.
func TestNotTaken(t *testing.T) {
	w := newWorld(t, Config{})
	w.answers(apierrors.NewInvalid(schema.GroupKind{Group: "events.k8s.io", Kind: "Event"}, "x", nil))
	w.run(t)
	w.Record(warning("foo", "x"))
	for end := time.Now().Add(20 * time.Second); w.Stats().Failed == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("stats %+v", w.Stats())
		}
	}
	w.answers(nil)
	w.Record(warning("foo", "x"))
	w.until(t, "Event", count(1))
}

func TestCut(t *testing.T) {
	for _, n := range []int{1024, 1025, 1026, 1027} {
		got := cut(strings.Repeat("ä", 600), n)
		if len(got) > n || !utf8.ValidString(got) || !strings.HasSuffix(got, "…") && n < 1200 {
			t.Errorf("%d: %d bytes, valid %v", n, len(got), utf8.ValidString(got))
		}
	}
	if got := cut("short", 1024); got != "short" {
		t.Error(got)
	}
}

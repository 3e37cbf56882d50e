package events

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"log/slog"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	typedv1 "k8s.io/client-go/kubernetes/typed/events/v1"
	"k8s.io/client-go/tools/record/util"
	"k8s.io/client-go/util/flowcontrol"

	"github.com/kptrace/kptrace/proxy"
)

// The limits of the API (k8s.io/kubernetes/pkg/apis/core/validation), in bytes.
const (
	maxNote = 1024
	maxWord = 128
)

const (
	// maxQueue bounds what waits to be written.
	maxQueue = 512
	// maxObjects bounds how many objects and series are remembered.
	maxObjects = 1024
	// seriesEvery is how often the count of a series is written, seriesOver
	// how long after its last event it has ended.
	seriesEvery = time.Minute
	seriesOver  = 6 * time.Minute
)

// Config says who writes Events, and where.
type Config struct {
	// Client is client-go's, of any clientset.
	Client typedv1.EventsV1Interface
	// Controller is the program, as "kube-proxy", Instance which of its
	// processes: the name of the node.
	Controller, Instance string
	// UID returns the UID of an object, empty if it is unknown. Without it
	// kubectl get events shows an Event, and kubectl describe does not. Nil
	// means all are unknown. It is not called for Nodes, whose Events have
	// their names there, as the kubelet's do.
	UID func(proxy.ObjectRef) types.UID
	// Rate and Burst limit new Events in a second, of all objects together: 1
	// and 50 if zero. ObjectRate and ObjectBurst are those of one object: one
	// in five minutes and 10 if zero.
	Rate, ObjectRate   float32
	Burst, ObjectBurst int
	Logger             *slog.Logger

	// Waits that tests shorten: see defaults.
	retry, retryMost, refusedAfter, refusedAgain, tick time.Duration
}

// defaults fills in what is not given.
func (c *Config) defaults() {
	set(&c.Rate, 1)
	set(&c.Burst, 50)
	set(&c.ObjectRate, 1.0/300)
	set(&c.ObjectBurst, 10)
	set(&c.retry, time.Second)
	set(&c.retryMost, 30*time.Second)
	// An API server that starts refuses everybody until it has read its rules.
	set(&c.refusedAfter, 15*time.Second)
	set(&c.refusedAgain, 10*time.Minute)
	set(&c.tick, seriesEvery)
	if c.UID == nil {
		c.UID = func(proxy.ObjectRef) types.UID { return "" }
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

func set[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Stats says what became of the events that were recorded.
type Stats struct {
	// Written counts Events, Repeated what only added to the count of one.
	Written, Repeated uint64
	// Limited counts what came too often, Dropped what found the queue full,
	// Refused what access rules kept out, Failed what the API server did not
	// take for another reason.
	Limited, Dropped, Refused, Failed uint64
}

// Recorder writes Events. Run starts it.
type Recorder struct {
	cfg   Config
	queue chan item

	mu      sync.Mutex // guards all below
	stats   Stats
	all     flowcontrol.PassiveRateLimiter
	objects map[proxy.ObjectRef]flowcontrol.PassiveRateLimiter
	series  map[proxy.ObjectEvent]*series
}

// item is an event to write: a new one, or a series that goes on.
type item struct {
	key proxy.ObjectEvent
	at  time.Time
}

// series is one Event and how often it happened.
type series struct {
	event   *eventsv1.Event // nil before it was written
	count   int32
	last    time.Time
	written int32 // the count that the API server knows
}

// New makes a Recorder that asks nobody yet.
func New(cfg Config) *Recorder {
	cfg.defaults()
	return &Recorder{
		cfg: cfg, queue: make(chan item, maxQueue),
		all:     flowcontrol.NewTokenBucketPassiveRateLimiter(cfg.Rate, cfg.Burst),
		objects: map[proxy.ObjectRef]flowcontrol.PassiveRateLimiter{},
		series:  map[proxy.ObjectEvent]*series{},
	}
}

// Stats may be called at any time.
func (r *Recorder) Stats() Stats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stats
}

// Record notes an event for writing. It never waits and may be called at any
// time by anybody; what is recorded before Run waits for it.
func (r *Recorder) Record(e proxy.ObjectEvent) {
	now := time.Now()
	e.Reason, e.Action, e.Note = cut(e.Reason, maxWord), cut(e.Action, maxWord), cut(e.Note, maxNote)
	r.mu.Lock()
	defer r.mu.Unlock()
	if s := r.series[e]; s != nil {
		s.count++
		s.last = now
		r.stats.Repeated++
		return // the tick writes it
	}
	if !r.limit(e.Object) {
		r.stats.Limited++
		return
	}
	if len(r.series) >= maxObjects {
		r.stats.Dropped++
		return
	}
	select {
	case r.queue <- item{e, now}:
		r.series[e] = &series{count: 1, last: now}
	default:
		r.stats.Dropped++
	}
}

// limit reports whether another new Event at an object is within the rates.
// The caller holds mu.
func (r *Recorder) limit(o proxy.ObjectRef) bool {
	l := r.objects[o]
	if l == nil {
		if len(r.objects) >= maxObjects {
			clear(r.objects)
		}
		l = flowcontrol.NewTokenBucketPassiveRateLimiter(r.cfg.ObjectRate, r.cfg.ObjectBurst)
		r.objects[o] = l
	}
	return l.TryAccept() && r.all.TryAccept()
}

// cut shortens text to n bytes, at the end of a character.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	const more = "…"
	for n -= len(more); n > 0 && !utf8.RuneStart(s[n]); {
		n--
	}
	return s[:n] + more
}

// Run writes Events until ctx ends, which is no error. It is called once.
func (r *Recorder) Run(ctx context.Context) error {
	w := &writer{cfg: &r.cfg}
	tick := time.NewTicker(r.cfg.tick)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case i := <-r.queue:
			r.create(ctx, w, i)
		case now := <-tick.C:
			r.goOn(ctx, w, now)
		}
	}
}

// create writes a new Event.
func (r *Recorder) create(ctx context.Context, w *writer, i item) {
	event := r.event(i)
	got := w.write(ctx, func(ctx context.Context) error {
		_, err := r.cfg.Client.Events(event.Namespace).Create(ctx, event, metav1.CreateOptions{})
		return err
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	r.count(got, &r.stats.Written)
	s := r.series[i.key]
	if got != written {
		// Refused ones are remembered too, or they would be tried each time.
		if got == failed {
			delete(r.series, i.key)
		}
		return
	}
	s.event, s.written = event, 1
}

func (r *Recorder) count(got result, good *uint64) {
	switch got {
	case written:
		*good++
	case refused:
		r.stats.Refused++
	case failed:
		r.stats.Failed++
	case stopped:
	}
}

// goOn writes the counts of series that grew, and forgets those that ended.
func (r *Recorder) goOn(ctx context.Context, w *writer, now time.Time) {
	type update struct {
		key   proxy.ObjectEvent
		event *eventsv1.Event
		count int32
	}
	var updates []update
	r.mu.Lock()
	for key, s := range r.series {
		switch {
		case s.event != nil && s.count > s.written && !key.Shared:
			e := s.event.DeepCopy()
			e.Series = &eventsv1.EventSeries{Count: s.count, LastObservedTime: metav1.NewMicroTime(s.last)}
			updates = append(updates, update{key, e, s.count})
		case now.Sub(s.last) > seriesOver && (s.event != nil || len(r.queue) == 0):
			delete(r.series, key)
		}
	}
	r.mu.Unlock()
	for _, u := range updates {
		got := w.write(ctx, func(ctx context.Context) error { return patch(ctx, r.cfg.Client, u.event) })
		r.mu.Lock()
		var none uint64
		r.count(got, &none)
		if s := r.series[u.key]; got == written && s != nil {
			s.written = u.count
		}
		r.mu.Unlock()
	}
}

// event makes the Event of an item.
func (r *Recorder) event(i item) *eventsv1.Event {
	o := i.key.Object
	ref := corev1.ObjectReference{Kind: o.Kind, Namespace: o.Namespace, Name: o.Name, APIVersion: "v1"}
	switch o.Kind {
	case "Node":
		ref.UID = types.UID(o.Name)
	case "EndpointSlice":
		ref.APIVersion = "discovery.k8s.io/v1"
		fallthrough
	default:
		ref.UID = r.cfg.UID(o)
	}
	namespace := o.Namespace
	if namespace == "" {
		namespace = metav1.NamespaceDefault
	}
	e := &eventsv1.Event{
		ObjectMeta:          metav1.ObjectMeta{Namespace: namespace, Name: util.GenerateEventName(o.Name, i.at.UnixNano())},
		EventTime:           metav1.NewMicroTime(i.at),
		ReportingController: r.cfg.Controller, ReportingInstance: r.cfg.Controller + "-" + r.cfg.Instance,
		Regarding: ref, Type: string(i.key.Type), Reason: i.key.Reason, Action: i.key.Action, Note: i.key.Note,
	}
	if i.key.Shared {
		// Every node makes the same name, and the first one wins. The UID is in
		// it, so that an object of the same name has its own.
		sum := sha256.Sum256([]byte(strings.Join([]string{string(ref.UID), o.String(), e.Type, e.Reason, e.Action, e.Note}, "\x00")))
		e.Name = util.GenerateEventName(o.Name, int64(binary.BigEndian.Uint64(sum[:8])>>1))
	}
	return e
}

package events

import (
	"context"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

var foo = proxy.PortName{Namespace: "shop", Name: "foo", Port: "http", Proto: conntrack.TCP}

func flow(pod string, outcomes ...string) *trace.Flow {
	f := &trace.Flow{Service: trace.ServiceRef{Name: foo}, Completed: true, Ended: true, Outcome: trace.Closed}
	for _, o := range outcomes {
		f.Attempts = append(f.Attempts, trace.Attempt{
			Endpoint: trace.Peer{Addr: netip.MustParseAddrPort("10.0.0.1:80"), Namespace: "shop", Pod: pod}, Outcome: o,
		})
		switch o {
		case "refused":
			f.Outcome, f.Reason = trace.Refused, trace.EndpointRefused
		case "established":
			f.Outcome, f.Reason = trace.Closed, trace.NoReason
		}
	}
	return f
}

func window(e *Exporter, n int, f *trace.Flow) []proxy.ObjectEvent {
	for range n {
		e.add(f)
	}
	return e.over()
}

func names(events []proxy.ObjectEvent) string {
	var b strings.Builder
	for _, e := range events {
		b.WriteString(e.Object.String() + " " + string(e.Type) + " " + e.Reason + "; ")
	}
	return b.String()
}

// TestPersistent: told once it lasted, at the Service and the pod; told again
// rarely; and told when it is over.
func TestPersistent(t *testing.T) {
	e := New(Config{})
	bad, good := flow("foo-1", "refused"), flow("foo-1", "established")
	for i := range 6 {
		e.add(flow("foo-2", "established"))
		got := names(window(e, 10, bad))
		want := ""
		if i%3 == 2 {
			want = "Pod shop/foo-1 Warning EndpointRefused; Service shop/foo Warning EndpointRefused; "
		}
		if got != want {
			t.Errorf("window %d: %q, want %q", i, got, want)
		}
	}
	if got := window(e, 1, good); len(got) != 0 {
		t.Errorf("over with one connection: %v", got)
	}
	got := window(e, 10, good)
	if names(got) != "Service shop/foo Normal ConnectionsRecovered; " {
		t.Errorf("the end: %v", got)
	}
	if !strings.Contains(got[0].Note, "connections to shop/foo:http that get pod foo-1 (10.0.0.1:80) work again") {
		t.Errorf("note %q", got[0].Note)
	}
	if got := window(e, 10, good); len(got) != 0 {
		t.Errorf("twice: %v", got)
	}
}

// TestQuiet: what is rare, short, outweighed, the client's own doing or not
// ended is no event.
func TestQuiet(t *testing.T) {
	for name, one := range map[string]func(e *Exporter, i int){
		"rare":  func(e *Exporter, _ int) { e.add(flow("a", "refused")) },
		"short": func(e *Exporter, i int) { times(e, 10, flow("a", []string{"refused", "established"}[i%2])) },
		"outweighed": func(e *Exporter, _ int) {
			times(e, 10, flow("a", "refused"))
			times(e, 11, flow("a", "established"))
		},
		"client": func(e *Exporter, _ int) {
			f := flow("a", "established")
			f.Outcome, f.Reason = trace.Reset, trace.ResetByClient
			times(e, 10, f)
		},
		"open": func(e *Exporter, _ int) {
			f := flow("a", "refused")
			f.Completed = false
			times(e, 10, f)
		},
	} {
		e := New(Config{})
		for i := range 12 {
			one(e, i)
			if got := e.over(); len(got) != 0 {
				t.Errorf("%s: %v", name, got)
			}
		}
	}
}

func times(e *Exporter, n int, f *trace.Flow) {
	for range n {
		e.add(f)
	}
}

// TestRetried: an endpoint that fails is told of although another one served
// its connections; a Service without endpoints has no pod to tell.
func TestRetried(t *testing.T) {
	e := New(Config{Windows: 1})
	f := flow("dead", "refused", "established")
	f.Attempts[1].Endpoint = trace.Peer{Addr: netip.MustParseAddrPort("10.0.0.2:80"), Namespace: "shop", Pod: "alive"}
	if got := names(window(e, 10, f)); got != "Pod shop/dead Warning EndpointRefused; Service shop/foo Warning EndpointRefused; " {
		t.Error(got)
	}
	e = New(Config{Windows: 1})
	f = flow("")
	f.Outcome, f.Reason = trace.Rejected, trace.NoEndpoints
	got := window(e, 10, f)
	if names(got) != "Service shop/foo Warning NoEndpoints; " {
		t.Error(got)
	}
	if note := got[0].Note; !strings.HasPrefix(note, "most connections to shop/foo:http fail: The Service has no endpoint") || len(note) > 1024 {
		t.Errorf("note %q", note)
	}
	// An endpoint came.
	got = window(e, 10, flow("foo-1", "established"))
	if names(got) != "Service shop/foo Normal ConnectionsRecovered; " || got[0].Note != "connections to shop/foo:http work again" {
		t.Errorf("the end: %v", got)
	}
}

// TestForgotten: what nobody connects to any more is forgotten.
func TestForgotten(t *testing.T) {
	e := New(Config{Windows: 1})
	window(e, 10, flow("a", "refused"))
	for range quietMost {
		if got := e.over(); len(got) != 0 {
			t.Fatal(got)
		}
	}
	if len(e.streaks) != 0 {
		t.Errorf("%d are remembered", len(e.streaks))
	}
}

func TestRun(t *testing.T) {
	ring := trace.NewRing(1 << 8)
	var mu sync.Mutex
	var got []proxy.ObjectEvent
	e := New(Config{Window: 300 * time.Millisecond, Windows: 2, Least: 1, Record: func(x proxy.ObjectEvent) {
		mu.Lock()
		defer mu.Unlock()
		got = append(got, x)
	}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	reader := ring.NewReader()
	go func() { done <- e.Run(ctx, reader) }()
	deadline := time.Now().Add(20 * time.Second)
	for {
		ring.Publish(flow("a", "refused"))
		mu.Lock()
		n := len(got)
		mu.Unlock()
		if n > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nothing was told")
		}
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

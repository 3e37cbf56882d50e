package userspace

import (
	"bytes"
	"context"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// notifier is a Relay as far as the Source knows it.
type notifier struct {
	mu sync.Mutex
	f  func(*proxy.RelayEvent)
}

func (n *notifier) Notify(f func(*proxy.RelayEvent)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.f = f
}

func sample() *proxy.RelayEvent {
	at := netip.MustParseAddrPort
	return &proxy.RelayEvent{
		Kind: proxy.RelayPick, ID: 7, Time: time.Unix(5, 6), FromNode: true,
		Tuple: conntrack.NewTuple(conntrack.TCP, at("10.0.0.1:4000"), at("10.96.0.1:80")),
		Local: at("192.0.2.1:40001"), Tag: proxy.Tag{Kind: proxy.TagPick, ID: "ABC"},
		Affinity: "hit", Age: time.Second, Upstream: at("[2001:db8::1]:5"), Failure: proxy.FailedTimeout,
		End: proxy.EndedByEndpoint, Out: 10, In: 20,
	}
}

func TestEvents(t *testing.T) {
	rule := &proxy.Rule{Purpose: "x"}
	d := NewDecoder(func(tag []byte) *proxy.Rule {
		if string(tag) == "kp1:pick:ABC" {
			return rule
		}
		return nil
	})
	e := sample()
	got := d.Decode(trace.Frame{Data: appendEvent(nil, e)}, nil)
	if len(got) != 1 {
		t.Fatalf("%d events", len(got))
	}
	g := got[0]
	if g.Kind != trace.KindPick || g.Rule != rule || g.Tuple != e.Tuple || g.Time != e.Time.UnixNano() || g.Hook != 3 ||
		g.Reply != conntrack.NewTuple(conntrack.TCP, e.Local, e.Tuple.Src()) || g.Out.Bytes != 10 || g.In.Bytes != 20 {
		t.Errorf("got %+v", g)
	}
	want := trace.Relayed{ID: 7, Failure: e.Failure, End: e.End, Affinity: trace.AffinityHit, Age: e.Age, Upstream: e.Upstream}
	if *g.Relayed != want {
		t.Errorf("got %+v, want %+v", *g.Relayed, want)
	}
}

// TestRoom fills the buffer while nobody reads: what finds no room is counted to
// the last one, and the rest arrives.
func TestRoom(t *testing.T) {
	var n notifier
	var losses []trace.Loss
	s := New(Config{Relay: &n, Room: 20 * maxEvent, Tick: time.Hour, OnLoss: func(l trace.Loss) { losses = append(losses, l) }})
	ctx, cancel := context.WithCancel(t.Context())
	ready := make(chan struct{})
	done := make(chan error, 1)
	var got []trace.Event
	go func() {
		done <- s.Run(ctx, func() { close(ready) }, func(f trace.Frame) { got = s.Decoder().Decode(f, got) })
	}()
	<-ready
	const sent = 100
	for range sent {
		n.f(sample())
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if len(losses) != 1 || int(losses[0].Events)+len(got) != sent || len(got) < 20 || s.Stats().Lost != losses[0].Events {
		t.Errorf("%d arrived, losses %+v, stats %+v", len(got), losses, s.Stats())
	}
	if n.f != nil {
		t.Error("the proxy still tells a Source that ended")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(appendEvent(nil, sample()))
	f.Add(appendEvent(appendEvent(nil, sample()), sample()))
	f.Fuzz(func(t *testing.T, data []byte) {
		before := bytes.Clone(data)
		NewDecoder(nil).Decode(trace.Frame{Data: data}, nil)
		if !bytes.Equal(before, data) {
			t.Error("the frame was changed")
		}
	})
}

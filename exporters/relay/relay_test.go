package relay

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// bench is a node without a kernel: a Server with everything it asks.
type bench struct {
	ring     *trace.Ring
	history  *trace.History
	view     atomic.Pointer[proxy.View]
	live     []*trace.Flow
	direct   atomic.Pointer[map[trace.Target]trace.Direct]
	wantsAll atomic.Int64
	watching atomic.Int64
	settle   func()
	socket   string
	client   *Client
	stop     func()
}

var begin = time.Now().Add(-time.Minute)

func service(name, port string, number uint16, ready ...bool) proxy.Service {
	ns, name, _ := strings.Cut(name, "/")
	s := proxy.Service{
		Name: proxy.PortName{Namespace: ns, Name: name, Port: port, Proto: conntrack.TCP},
		Type: "ClusterIP", ClusterIP: netip.MustParseAddr("10.96.0.10"), Port: number,
	}
	for i, r := range ready {
		s.Endpoints = append(s.Endpoints, proxy.Endpoint{
			Addr: netip.MustParseAddrPort(fmt.Sprintf("10.244.0.%d:8080", i+1)), Ready: r, Serving: r,
		})
	}
	return s
}

func start(t *testing.T) *bench {
	t.Helper()
	b := &bench{
		ring:    trace.NewRing(1024),
		history: trace.NewHistory(trace.HistoryConfig{Start: begin}),
		socket:  filepath.Join(t.TempDir(), "dir", "kptrace.sock"),
	}
	b.view.Store(&proxy.View{Mode: proxy.IPTables, Snapshot: &proxy.Snapshot{
		Node: proxy.Node{Name: "node1"},
		Services: []proxy.Service{
			service("shop/foo", "http", 80, true, true, false), service("shop/sticky", "", 80, true),
			service("web/front", "", 443),
		},
		Skipped:  []proxy.Skipped{{Namespace: "shop", Name: "db", Reason: "headless"}, {Namespace: "shop", Name: "ext", Reason: "ExternalName"}},
		Problems: []proxy.Problem{{File: "bad.yaml", Object: "Service shop/broken", Message: "no ports"}},
	}})
	b.direct.Store(&map[trace.Target]trace.Direct{})
	srv := NewServer(Config{
		Ring: b.ring, History: b.history, View: b.view.Load,
		Live: func(yield func(*trace.Flow) bool) {
			for _, f := range b.live {
				if !yield(f) {
					return
				}
			}
		},
		Status: func() Status {
			return Status{Version: "v0", Mode: proxy.IPTables, Sources: []trace.SourceStats{{Source: trace.NFLog, Events: 7, Note: "no listener"}}}
		},
		Watching: func(d int) { b.watching.Add(int64(d)) },
		Settle: func(context.Context, time.Time) {
			if b.settle != nil {
				b.settle()
			}
		},
		WatchingDirect: func(d int) { b.wantsAll.Add(int64(d)) },
		Direct:         func() map[trace.Target]trace.Direct { return *b.direct.Load() },
		Findings: func(names []proxy.PortName) []string {
			if len(names) == 1 && names[0].Name == "foo" {
				return []string{"a finding about foo"}
			}
			return nil
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.Run(ctx, b.socket) }()
	b.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(b.stop)
	for range 200 {
		if c, err := Dial(b.socket); err == nil {
			b.client = c
			t.Cleanup(func() { _ = c.Close() })
			return b
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("the server did not come up")
	return nil
}

func (b *bench) publish(f *trace.Flow) {
	b.history.Put(f)
	b.ring.Publish(f)
}

func flow(id int, rev uint32, service string, o trace.Outcome) *trace.Flow {
	ns, name, _ := strings.Cut(service, "/")
	return &trace.Flow{
		ID: trace.FlowID(id), Revision: rev, Start: begin.Add(time.Duration(id) * time.Millisecond), Node: "node1",
		Service: trace.ServiceRef{
			Name: proxy.PortName{Namespace: ns, Name: name, Port: "http", Proto: conntrack.TCP},
			Addr: netip.MustParseAddrPort("10.96.0.10:80"),
		},
		Outcome: o, Ended: o != trace.Open && o != trace.Pending && o != trace.Unanswered,
		Established: -1, Duration: -1,
	}
}

func request(words ...string) trace.Request {
	var req trace.Request
	for _, w := range words {
		s, err := trace.ParseResource(w, "shop")
		if err != nil {
			panic(err)
		}
		req.Filter.Resources = append(req.Filter.Resources, s)
	}
	return req
}

// follow runs a Follow beside act, which begins when the header is there and
// at whose end the Follow is asked to finish.
func (b *bench) follow(t *testing.T, req trace.Request, act func()) []trace.Message {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got []trace.Message
	err := b.client.Follow(ctx, req, func(m trace.Message) error {
		got = append(got, m)
		if m.Header != nil {
			go func() {
				defer cancel()
				act()
			}()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) < 2 || got[0].Header == nil || got[len(got)-1].End == nil {
		t.Fatalf("a stream without header or end: %+v", got)
	}
	return got
}

func flowsOf(messages []trace.Message) (list []string) {
	for _, m := range messages {
		if m.Flow != nil {
			text := fmt.Sprintf("%d.%d %s", uint64(m.Flow.ID), m.Flow.Revision, m.Flow.Outcome)
			if m.Gone {
				text += " gone"
			}
			list = append(list, text)
		}
	}
	return list
}

func same(t *testing.T, got []string, want ...string) {
	t.Helper()
	if strings.Join(got, ", ") != strings.Join(want, ", ") {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

func TestFollow(t *testing.T) {
	b := start(t)
	got := b.follow(t, request("svc/foo"), func() {
		if n := b.watching.Load(); n != 1 {
			t.Errorf("%d watching, want 1", n)
		}
		b.publish(flow(1, 1, "shop/foo", trace.Pending))
		b.publish(flow(2, 1, "shop/other", trace.Closed))
		b.publish(flow(1, 2, "shop/foo", trace.Open))
		b.publish(flow(1, 3, "shop/foo", trace.Closed))
		b.ring.PublishLoss(trace.Loss{Source: trace.NFLog, Events: 5, Where: "kernel"})
	})
	same(t, flowsOf(got), "1.1 pending", "1.2 open", "1.3 closed")
	h := got[0].Header
	if h.Node != "node1" || h.Mode != proxy.IPTables || len(h.Services) != 1 || h.Services[0].Ready != 2 || h.Services[0].Total != 3 {
		t.Errorf("header %+v", h)
	}
	if got[0].Node != "node1" || !h.Since.Equal(begin) {
		t.Errorf("from %q since %v", got[0].Node, h.Since)
	}
	if end := got[len(got)-1].End; len(end.Losses) != 1 || end.Losses[0].Events != 5 {
		t.Errorf("end %+v", end)
	}
	if n := b.watching.Load(); n != 0 {
		t.Errorf("%d still watching", n)
	}
}

func TestFollowHoldsBackWhatHasNotEnded(t *testing.T) {
	b := start(t)
	req := request("svc/foo")
	req.Interval = time.Hour
	got := b.follow(t, req, func() {
		b.publish(flow(1, 1, "shop/foo", trace.Pending))
		b.publish(flow(2, 1, "shop/foo", trace.Pending))
		b.publish(flow(2, 2, "shop/foo", trace.Open))
		b.publish(flow(1, 2, "shop/foo", trace.Closed))
	})
	same(t, flowsOf(got), "1.2 closed", "2.2 open")
}

// TestFollowWaitsForPaths has a path be under way when the follower is to end.
func TestFollowWaitsForPaths(t *testing.T) {
	b := start(t)
	b.settle = func() { b.publish(flow(1, 2, "shop/foo", trace.Closed)) }
	req := request("svc/foo")
	same(t, flowsOf(b.follow(t, req, func() { b.publish(flow(1, 1, "shop/foo", trace.Closed)) })), "1.1 closed")
	req.Path.Packets = 1
	same(t, flowsOf(b.follow(t, req, func() { b.publish(flow(2, 1, "shop/foo", trace.Closed)) })), "2.1 closed", "1.2 closed")
}

func TestFollowByOutcome(t *testing.T) {
	b := start(t)
	req := request("svc/foo")
	req.Filter.Outcomes = []trace.Outcome{trace.Unanswered}
	got := b.follow(t, req, func() {
		b.publish(flow(1, 1, "shop/foo", trace.Pending))
		b.publish(flow(1, 2, "shop/foo", trace.Unanswered))
		b.publish(flow(2, 1, "shop/foo", trace.Closed))
		b.publish(flow(1, 3, "shop/foo", trace.Open))
		b.publish(flow(1, 4, "shop/foo", trace.Closed))
	})
	same(t, flowsOf(got), "1.2 unanswered", "1.3 open gone")
}

func TestFollowHistoryFirst(t *testing.T) {
	b := start(t)
	for id := range 10 {
		b.publish(flow(id+1, 1, "shop/foo", trace.Closed))
	}
	req := request("svc/foo")
	req.Since, req.Last = begin.Add(-time.Hour), 2
	got := b.follow(t, req, func() { b.publish(flow(11, 1, "shop/foo", trace.Refused)) })
	same(t, flowsOf(got), "9.1 closed", "10.1 closed", "11.1 refused")
	if notes := strings.Join(got[0].Header.Notes, "\n"); !strings.Contains(notes, "all are held since "+clock(begin)) {
		t.Errorf("notes %q do not say the true start", notes)
	}
}

func TestFollowErrors(t *testing.T) {
	b := start(t)
	for word, want := range map[string]string{
		"svc/fooo":   "no Service shop/fooo: did you mean svc/foo?",
		"svc/front":  "no Service shop/front: it exists in namespace web: add -n web",
		"svc/zzzz":   "namespace shop has foo, sticky",
		"svc/foo:ht": "Service shop/foo has no port ht: it has http",
		"svc/db":     "Service shop/db has no decisions to show: it is headless",
		"svc/ext":    "it is of type ExternalName",
		"svc/broken": "bad.yaml: Service shop/broken: no ports",
	} {
		err := b.client.Follow(t.Context(), request(word), func(trace.Message) error { return nil })
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "rpc error") {
			t.Errorf("%s: %v, want %q", word, err, want)
		}
		kind := ErrNotFound
		if strings.Contains(want, "headless") || strings.Contains(want, "ExternalName") {
			kind = ErrNoDecisions
		}
		if !errors.Is(err, kind) {
			t.Errorf("%s: %v is not %v", word, err, kind)
		}
	}
	req := request("svc/fooo")
	req.Wait = true
	got := b.follow(t, req, func() { b.publish(flow(1, 1, "shop/fooo", trace.Closed)) })
	same(t, got[0].Header.Unknown, "svc/fooo")
	same(t, flowsOf(got), "1.1 closed")
	req = request("svc/foo")
	req.Filter.Ports = []trace.Port{{Number: 99}}
	if err := b.client.Follow(t.Context(), req, func(trace.Message) error { return nil }); err == nil || !strings.Contains(err.Error(), "Service shop/foo has no port 99: it has http") {
		t.Errorf("--port 99: %v", err)
	}
	// What nobody has heard of may still come: a note, and no error.
	req = trace.Request{Filter: trace.Filter{Namespace: "shp", From: []trace.Selector{{Kind: trace.SelectPod, Namespace: "shop", Name: "nosuch"}}}}
	notes := strings.Join(b.follow(t, req, func() {})[0].Header.Notes, "\n")
	for _, want := range []string{"namespace shp has no Services: there are some in shop, web", "no pod shop/nosuch is known here"} {
		if !strings.Contains(notes, want) {
			t.Errorf("notes %q, want %q", notes, want)
		}
	}
	b.view.Store(nil)
	if err := b.client.Follow(t.Context(), request("svc/foo"), nil); !errors.Is(err, ErrNotReady) {
		t.Errorf("before the first sync: %v", err)
	}
}

func TestFollowExplainsSilence(t *testing.T) {
	b := start(t)
	b.publish(flow(5, 1, "shop/foo", trace.Closed))
	got := b.follow(t, request("svc/foo"), func() {
		b.publish(flow(6, 1, "shop/other", trace.Closed))
		time.Sleep(idleAfter + time.Second)
	})
	if len(got) != 3 || got[1].Idle == nil {
		t.Fatalf("got %+v", got)
	}
	i := got[1].Idle
	if i.Others != 1 || !i.Last.Equal(begin.Add(5*time.Millisecond)) || len(i.Sources) != 1 || i.Sources[0].Events != 7 || i.For < idleAfter {
		t.Errorf("idle %+v", i)
	}
	if !slices.Equal(i.Findings, []string{"a finding about foo"}) {
		t.Errorf("findings %q", i.Findings)
	}
	if blind := strings.Join(i.Blind, "\n"); !strings.Contains(blind, "nflog: no listener") {
		t.Errorf("blind %q", blind)
	}
}

// TestDirect counts connections past the Service that was asked for, and sends
// them to those only who want them.
func TestDirect(t *testing.T) {
	b := start(t)
	endpoints := b.view.Load().Snapshot.Services
	foo, other := endpoints[0].Endpoints[0].Addr, netip.MustParseAddrPort("10.9.9.9:1")
	b.direct.Store(&map[trace.Target]trace.Direct{{Proto: conntrack.TCP, Addr: foo}: {Pods: 3}})
	act := func() {
		b.direct.Store(&map[trace.Target]trace.Direct{
			{Proto: conntrack.TCP, Addr: foo}: {Pods: 5, Node: 1}, {Proto: conntrack.TCP, Addr: other}: {Elsewhere: 7},
		})
		f := flow(6, 1, "web/front", trace.Closed) // its name is that of the first Service it belongs to
		f.Service.Via, f.Backend.Addr, f.Tuple = proxy.ViaDirect, foo, conntrack.NewTuple(conntrack.TCP, other, foo)
		b.ring.Publish(f)
		b.publish(flow(7, 1, "shop/foo", trace.Closed))
	}
	got := b.follow(t, request("svc/foo"), act)
	same(t, flowsOf(got), "7.1 closed")
	if d := got[len(got)-1].End.Direct; d != (trace.Direct{Pods: 2, Node: 1}) {
		t.Errorf("counted %+v", d)
	}
	b.direct.Store(&map[trace.Target]trace.Direct{})
	req := request("svc/foo")
	req.Direct = true
	seen := int64(0)
	got = b.follow(t, req, func() { seen = b.wantsAll.Load(); act() })
	same(t, flowsOf(got), "6.1 closed", "7.1 closed")
	if got[1].Flow.Service.Name.Name != "foo" || seen != 1 || b.wantsAll.Load() != 0 {
		t.Errorf("it is of %v; %d followers wanted it, then %d", got[1].Flow.Service.Name, seen, b.wantsAll.Load())
	}
	req = trace.Request{}
	b.direct.Store(&map[trace.Target]trace.Direct{})
	got = b.follow(t, req, act)
	if d := got[len(got)-1].End.Direct; d != (trace.Direct{Pods: 5, Node: 1, Elsewhere: 7}) {
		t.Errorf("of all Services %+v", d)
	}
}

// TestBlockedFollower: a client that does not read costs the writer nothing
// and learns what it missed.
func TestBlockedFollower(t *testing.T) {
	b := start(t)
	const n = 100_000
	blocked := make(chan struct{})
	var flows, lost uint64
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() {
		done <- b.client.Follow(ctx, request("svc/foo"), func(m trace.Message) error {
			switch {
			case m.Header != nil:
				close(blocked)
				time.Sleep(500 * time.Millisecond)
			case m.Flow != nil:
				flows++
			case m.End != nil:
				for _, l := range m.End.Losses {
					lost += l.Events
				}
			}
			return nil
		})
	}()
	<-blocked
	begun := time.Now()
	f := flow(1, 1, "shop/foo", trace.Closed)
	for range n {
		b.ring.Publish(f)
	}
	if took := time.Since(begun); took > 400*time.Millisecond {
		t.Errorf("publishing %d flows took %v", n, took)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if flows+lost != n || lost == 0 {
		t.Errorf("%d shown + %d lost, want %d in all and some lost", flows, lost, n)
	}
}

func TestFlows(t *testing.T) {
	b := start(t)
	b.publish(flow(1, 1, "shop/foo", trace.Refused))
	b.publish(flow(2, 1, "shop/foo", trace.Closed))
	for i, ep := range []string{"10.244.0.9:80", "10.244.0.2:80", "10.244.0.9:80"} {
		f := flow(10+i, 1, "shop/foo", trace.Open)
		f.Backend.Addr = netip.MustParseAddrPort(ep)
		b.live = append(b.live, f)
	}
	var got []trace.Message
	keep := func(m trace.Message) error {
		got = append(got, m)
		return nil
	}
	if err := b.client.Flows(t.Context(), request("svc/foo"), keep); err != nil {
		t.Fatal(err)
	}
	same(t, flowsOf(got), "1.1 refused", "2.1 closed")
	got = nil
	if err := b.client.Existing(t.Context(), request("svc/foo"), keep); err != nil {
		t.Fatal(err)
	}
	same(t, flowsOf(got), "11.1 open", "10.1 open", "12.1 open")
	if f, err := b.client.Flow(t.Context(), 11); err != nil || f.Outcome != trace.Open {
		t.Errorf("a live one by id: %+v, %v", f, err)
	}
	if _, err := b.client.Flow(t.Context(), 99); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "no flow 0000000000033 on node1") {
		t.Errorf("none by id: %v", err)
	}
	if st, err := b.client.Status(t.Context()); err != nil || st.Version != "v0" {
		t.Errorf("status %+v, %v", st, err)
	}
}

func TestPanicIsAnError(t *testing.T) {
	b := start(t)
	b.view.Store(&proxy.View{Snapshot: b.view.Load().Snapshot, Program: panicky{}})
	req := request("svc/foo")
	ctx, cancel := context.WithTimeout(t.Context(), idleAfter+2*time.Second)
	defer cancel()
	err := b.client.Follow(ctx, req, func(trace.Message) error { return nil })
	if err == nil || !strings.Contains(err.Error(), "fault of its own: seeded") {
		t.Errorf("got %v", err)
	}
	if _, err := b.client.Status(t.Context()); err != nil {
		t.Errorf("the server did not survive: %v", err)
	}
}

type panicky struct{ proxy.Program }

func (panicky) Index() proxy.Index { panic("seeded") }

func TestSocket(t *testing.T) {
	b := start(t)
	for path, want := range map[string]fs.FileMode{b.socket: 0o600, filepath.Dir(b.socket): 0o700} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v; want %v", path, info.Mode(), err, want)
		}
	}
	_, err := listen(b.socket)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("(pid %d)", os.Getpid())) {
		t.Errorf("a live socket: %v", err)
	}
	b.stop()
	if _, err := os.Stat(b.socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
	if _, err := Dial(b.socket); !errors.Is(err, ErrNotRunning) {
		t.Errorf("nobody there: %v", err)
	}

	dir := t.TempDir()
	stale := filepath.Join(dir, "s.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	l2, err := listen(stale)
	if err != nil {
		t.Fatalf("a dead process's socket: %v", err)
	}
	_ = l2.Close()

	if err := os.WriteFile(stale, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(stale); err == nil || !strings.Contains(err.Error(), "is no socket") {
		t.Errorf("a file: %v", err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(filepath.Join(dir, "x")); err == nil || !strings.Contains(err.Error(), "others may write") {
		t.Errorf("an open folder: %v", err)
	}
	if _, err := listen(filepath.Join(dir, strings.Repeat("x", 200))); err == nil || !strings.Contains(err.Error(), "the kernel takes 107") {
		t.Errorf("a long path: %v", err)
	}
}

func TestDiscover(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("KPTRACE_SOCKET", filepath.Join(dir, "k.sock"))
	if _, err := Discover(); !errors.Is(err, ErrNotRunning) {
		t.Errorf("nothing there: %v", err)
	}
	for _, path := range []string{LabSocket("node2"), LabSocket("node1"), DefaultSocket()} {
		l, err := listen(path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
	}
	got, err := Discover()
	if err != nil {
		t.Fatal(err)
	}
	same(t, got, DefaultSocket(), LabSocket("node1"), LabSocket("node2"))
}

func TestServerEndsStreamsInOrder(t *testing.T) {
	b := start(t)
	ended := false
	err := b.client.Follow(t.Context(), request("svc/foo"), func(m trace.Message) error {
		if m.Header != nil {
			go b.stop()
		}
		ended = ended || m.End != nil
		return nil
	})
	if err != nil || !ended {
		t.Errorf("ended %v, %v", ended, err)
	}
}

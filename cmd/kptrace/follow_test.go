package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/exporters/relay"
	"github.com/kptrace/kptrace/internal/features"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// fakeNode is a node without a kernel, served over a real socket.
type fakeNode struct {
	name    string
	ring    *trace.Ring
	history *trace.History
	live    []*trace.Flow
	// trace is called when somebody asks for paths, which are traced when it returns.
	trace func(context.Context)
}

func startNode(t *testing.T, name, service, socket string) *fakeNode {
	t.Helper()
	n := &fakeNode{name: name, ring: trace.NewRing(4096), history: trace.NewHistory(trace.HistoryConfig{})}
	ns, svc, _ := strings.Cut(service, "/")
	view := &proxy.View{Mode: proxy.IPTables, Snapshot: &proxy.Snapshot{
		Node: proxy.Node{Name: name},
		Services: []proxy.Service{{
			Name: proxy.PortName{Namespace: ns, Name: svc, Port: "http", Proto: conntrack.TCP},
			Type: "ClusterIP", ClusterIP: netip.MustParseAddr("10.96.0.10"), Port: 80,
			Endpoints: []proxy.Endpoint{{Addr: netip.MustParseAddrPort("10.244.0.1:8080"), Ready: true}},
		}},
	}}
	server := relay.NewServer(relay.Config{
		Ring: n.ring, History: n.history, View: func() *proxy.View { return view },
		Live: func(yield func(*trace.Flow) bool) {
			for _, f := range n.live {
				if !yield(f) {
					return
				}
			}
		},
		Trace: func(ctx context.Context, _ *trace.Request) (func(), error) {
			if n.trace != nil {
				n.trace(ctx)
			}
			return func() {}, nil
		},
		Status: func() relay.Status {
			return relay.Status{
				Node: name, Version: "v1", Mode: proxy.IPTables, Flavour: "nft", FlavourReason: "default",
				Problems: []proxy.Problem{{File: "a.yaml", Object: "Service shop/x", Message: "no ports"}},
				Sources:  []trace.SourceStats{{Source: trace.NFLog, Events: 9}},
			}
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx, socket) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("%s: %v", name, err)
		}
	})
	for range 400 {
		if c, err := relay.Dial(socket); err == nil {
			_ = c.Close()
			return n
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("%s did not come up", name)
	return nil
}

func (n *fakeNode) publish(id int, service string, o trace.Outcome) *trace.Flow {
	return n.put(n.flow(id, service, o))
}

func (n *fakeNode) put(f *trace.Flow) *trace.Flow {
	n.history.Put(f)
	n.ring.Publish(f)
	return f
}

func (n *fakeNode) flow(id int, service string, o trace.Outcome) *trace.Flow {
	ns, svc, _ := strings.Cut(service, "/")
	return &trace.Flow{
		ID: trace.FlowID(id), Revision: 1, Start: time.Now(), Node: n.name,
		Tuple:  conntrack.NewTuple(conntrack.TCP, netip.MustParseAddrPort("10.244.1.5:4000"), netip.MustParseAddrPort("10.96.0.10:80")),
		Client: trace.Peer{Addr: netip.MustParseAddrPort("10.244.1.5:4000"), Namespace: "shop", Pod: "web"},
		Service: trace.ServiceRef{
			Name: proxy.PortName{Namespace: ns, Name: svc, Port: "http", Proto: conntrack.TCP},
			Addr: netip.MustParseAddrPort("10.96.0.10:80"),
		},
		Backend: trace.Peer{Addr: netip.MustParseAddrPort("10.244.0.1:8080"), Namespace: "shop", Pod: "foo-1"},
		Outcome: o, Ended: o != trace.Open && o != trace.Pending, Established: -1, Duration: -1,
	}
}

// call runs one verb and returns its exit code and output.
func call(ctx context.Context, verb *cobra.Command, args ...string) (code int, stdout, stderr string) {
	var out, talk lockedBuffer
	verb.SilenceErrors, verb.SilenceUsage = true, true
	verb.SetArgs(append([]string{}, args...)) // not nil, which stands for os.Args
	verb.SetOut(&out)
	verb.SetErr(&talk)
	err := verb.ExecuteContext(ctx)
	var exit *exitCodeError
	switch {
	case errors.As(err, &exit):
		code = exit.code
	case err != nil:
		code = exitError
	}
	if err != nil {
		return code, out.String(), talk.String() + err.Error()
	}
	return 0, out.String(), talk.String()
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// lonely points everything at a folder in which nobody listens.
func lonely(t *testing.T) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "d", "k.sock")
	t.Setenv("KPTRACE_SOCKET", socket)
	t.Setenv("KPTRACE_NAMESPACE", "")
	return socket
}

func TestFollowNobodyRuns(t *testing.T) {
	lonely(t)
	for name, verb := range map[string]*cobra.Command{"follow": newFollowCmd(), "status": newStatusCmd()} {
		code, out, talk := call(t.Context(), verb)
		if code != exitError || out != "" || !strings.Contains(talk, "no kptrace runs here: start `kptrace proxy`, `kptrace agent` or `kptrace lab up`") {
			t.Errorf("%s: %d, %q, %q", name, code, out, talk)
		}
	}
}

// TestForBeginsWhenTracingRuns asks for paths of a node that takes longer to trace
// them than the time that was asked for.
func TestForBeginsWhenTracingRuns(t *testing.T) {
	socket := lonely(t)
	n := startNode(t, "node1", "shop/foo", socket)
	const asked = 500 * time.Millisecond
	cut := false
	n.trace = func(ctx context.Context) {
		select {
		case <-ctx.Done():
			cut = true
		case <-time.After(3 * asked):
		}
		time.AfterFunc(asked/10, func() { n.publish(1, "shop/foo", trace.Closed) })
	}
	began := time.Now()
	code, out, talk := call(t.Context(), newFollowCmd(), "svc/foo", "-n", "shop", "-o", "jsonl", "--packets", "1", "--for", asked.String())
	if code != 0 || cut || !strings.Contains(out, `"closed"`) {
		t.Errorf("exit %d, ended before paths were traced %v: %q, %q", code, cut, out, talk)
	}
	if d := time.Since(began); d < 4*asked {
		t.Errorf("followed for %v, %v of it before paths were traced", d, 3*asked)
	}
	// With --wait it is the time of waiting, too.
	t.Setenv("KPTRACE_SOCKET", socket+".nobody")
	code, _, talk = call(t.Context(), newFollowCmd(), "svc/foo", "-n", "shop", "--wait", "--for", asked.String())
	if code != exitError || !strings.Contains(talk, "no kptrace runs here") {
		t.Errorf("waiting for a node: exit %d, %q", code, talk)
	}
}

func TestFollowUsage(t *testing.T) {
	lonely(t)
	for args, want := range map[string]string{
		"scv/foo":                         "did you mean svc?",
		"svc/foo --packets all":           "say for how long",
		"svc/foo --packets 0":             "use a number from 1 to 32, or all",
		"svc/foo --packets 3 --existing":  "does not go with --existing",
		"svc/foo -o jsnol":                "did you mean jsonl?",
		"svc/foo --outcome refusd":        "--outcome: unknown outcome \"refusd\": did you mean refused?",
		"svc/foo --from 10.0.0.0/99":      "--from \"10.0.0.0/99\" is neither",
		"svc/foo --port 0":                "--port: \"0\" is no port",
		"svc/foo --since yesterday":       "use an age such as 10m",
		"svc/foo --existing --since 1m":   "does not go with --since",
		"svc/foo --for 0s":                "say how much of it",
		"svc/foo --last -1 --since 1m":    "--last -1: use a number above 0",
		"svc/foo -n shop svc/shop/foo -A": "a namespace goes into -n",
	} {
		code, _, talk := call(t.Context(), newFollowCmd(), strings.Fields(args)...)
		if code != exitUsage || !strings.Contains(talk, want) {
			t.Errorf("%s: exit %d, %q; want %d and %q", args, code, talk, exitUsage, want)
		}
	}
	if code, _, talk := call(t.Context(), newShowCmd(), "xyz!"); code != exitUsage || !strings.Contains(talk, "is no ID") {
		t.Errorf("show: %d %q", code, talk)
	}
}

func TestFollowLive(t *testing.T) {
	n := startNode(t, "node1", "shop/foo", lonely(t))
	go func() {
		for id := range 50 {
			n.publish(id+1, "shop/foo", trace.Pending)
			n.publish(id+1, "shop/foo", trace.Closed)
			time.Sleep(5 * time.Millisecond)
		}
		n.publish(51, "shop/foo", trace.Open)
		n.publish(52, "shop/other", trace.Closed)
	}()
	code, out, talk := call(t.Context(), newFollowCmd(), "svc/foo", "-n", "shop", "-o", "jsonl", "--for", "1500ms", "--last", "100")
	if code != 0 {
		t.Fatalf("exit %d: %s", code, talk)
	}
	seen := make(map[string]int)
	for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
		var f struct{ ID, Outcome string }
		if err := json.Unmarshal([]byte(line), &f); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		seen[f.ID]++
		if f.Outcome == "pending" {
			t.Errorf("%s is shown before its end", f.ID)
		}
	}
	if len(seen) != 51 || len(strings.Split(strings.TrimSpace(out), "\n")) != 51 {
		t.Errorf("%d connections in %d lines, want 51 once each", len(seen), strings.Count(out, "\n"))
	}
	if !strings.HasSuffix(talk, "51 connections, 0 failed, 0 events lost, 1 not ended\n") {
		t.Errorf("talk %q", talk)
	}
}

// TestFollowSummaryByZone counts by the zone of the endpoint, alone and with
// another word, over what several nodes hold.
func TestFollowSummaryByZone(t *testing.T) {
	socket := lonely(t)
	nodes := []*fakeNode{startNode(t, "node1", "shop/foo", relay.LabSocket("node1")), startNode(t, "node2", "shop/foo", socket)}
	id := 0
	for _, c := range []struct {
		zone    string
		outcome trace.Outcome
		n       int
	}{{"zone-a", trace.Closed, 6}, {"zone-b", trace.Closed, 2}, {"zone-b", trace.Refused, 3}, {"", trace.Timeout, 1}} {
		for range c.n {
			id++
			n := nodes[id%2]
			f := n.flow(id, "shop/foo", c.outcome)
			f.Backend.Zone = c.zone
			if c.outcome == trace.Refused {
				f.Reason = trace.EndpointRefused
			}
			n.put(f)
		}
	}
	nodes[0].publish(id+1, "shop/other", trace.Refused)

	code, out, talk := call(t.Context(), newFollowCmd(), "svc/foo", "-n", "shop", "--summary", "--by", "zone")
	var got []string
	for line := range strings.Lines(out) {
		got = append(got, strings.Join(strings.Fields(line), " "))
	}
	want := []string{"ZONE CONNECTIONS FAILED OUTCOMES", "zone-b 5 3 (60 %) 2 closed, 3 refused", "- 1 1 (100 %) 1 timeout", "zone-a 6 0 (0.0 %) 6 closed"}
	if code != 0 || !slices.Equal(got, want) {
		t.Errorf("exit %d, %q, want %q; %s", code, got, want, talk)
	}

	code, out, talk = call(t.Context(), newFollowCmd(), "svc/foo", "-n", "shop", "--summary", "--by", "zone,reason", "-o", "json")
	var doc struct {
		By   []string
		Rows []struct {
			Values              []string
			Connections, Failed int
		}
	}
	if err := json.Unmarshal([]byte(out), &doc); code != 0 || err != nil {
		t.Fatalf("exit %d, %v: %s%s", code, err, out, talk)
	}
	if !slices.Equal(doc.By, []string{"zone", "reason"}) || len(doc.Rows) != 4 || doc.Rows[0].Failed != 3 ||
		!slices.Equal(doc.Rows[0].Values, []string{"zone-b", string(trace.EndpointRefused)}) {
		t.Errorf("got %s", out)
	}

	code, _, talk = call(t.Context(), newFollowCmd(), "svc/foo", "-n", "shop", "--summary", "--by", "zones")
	if code != exitUsage || !strings.Contains(talk, `--by: unknown word "zones": use backend, `) {
		t.Errorf("exit %d, %s", code, talk)
	}
}

func TestFollowSeveralNodesAndWait(t *testing.T) {
	socket := lonely(t)
	other := make(chan *fakeNode, 1)
	time.AfterFunc(300*time.Millisecond, func() { other <- startNode(t, "node1", "shop/foo", relay.LabSocket("node1")) })
	done := make(chan string, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		code, out, talk := call(ctx, newFollowCmd(), "svc/foo", "-n", "shop", "--wait")
		if code != 0 {
			t.Errorf("exit %d", code)
		}
		done <- out + talk
	}()
	n1 := <-other
	n2 := startNode(t, "node2", "web/front", socket)
	time.Sleep(400 * time.Millisecond)
	n1.publish(1, "shop/foo", trace.Refused)
	time.Sleep(100 * time.Millisecond)
	cancel()
	got := <-done
	for _, want := range []string{"waiting for a kptrace to start", "iptables on node1", "history since", "1 of 1 endpoint ready", "refused by endpoint", "1 connection, 1 failed"} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in:\n%s", want, got)
		}
	}
	// Now there are two nodes, and only one knows the Service.
	n1.publish(2, "shop/foo", trace.Reset)
	n2.publish(3, "web/front", trace.Closed)
	code, out, talk := call(t.Context(), newFollowCmd(), "svc/foo", "-n", "shop", "--since", "1m", "--for", "0s", "--no-header")
	if code != 0 || strings.Count(out, "\n") != 2 || !strings.Contains(talk, "2 connections, 2 failed") {
		t.Errorf("exit %d\n%s%s", code, out, talk)
	}
	code, _, talk = call(t.Context(), newFollowCmd(), "svc/fo", "-n", "shop")
	if code != exitError || !strings.Contains(talk, "no Service shop/fo") {
		t.Errorf("exit %d, %s", code, talk)
	}
}

func TestExistingShowStatus(t *testing.T) {
	socket := lonely(t)
	n := startNode(t, "node1", "shop/foo", socket)
	f := n.publish(7, "shop/foo", trace.Open)
	f.Existing, f.Start = true, time.Now().Add(-3*time.Minute)
	n.live = append(n.live, f)
	code, out, _ := call(t.Context(), newFollowCmd(), "svc/foo", "-n", "shop", "--existing")
	if code != 0 || !strings.Contains(out, "shop/foo:http > foo-1:8080: 1 open, the oldest for 3m0s") || !strings.Contains(out, "unknown (before start)") {
		t.Errorf("exit %d:\n%s", code, out)
	}
	code, out, _ = call(t.Context(), newShowCmd(), f.ID.String())
	if code != 0 || !strings.Contains(out, "flow          0000000000007 (revision 1) on node1") {
		t.Errorf("exit %d:\n%s", code, out)
	}
	code, out, _ = call(t.Context(), newShowCmd(), f.ID.String(), "-o", "json")
	if code != 0 || !json.Valid([]byte(out)) {
		t.Errorf("exit %d:\n%s", code, out)
	}
	code, _, talk := call(t.Context(), newShowCmd(), "000000000000a")
	if code != exitError || !strings.Contains(talk, "no flow 000000000000a on node1") {
		t.Errorf("exit %d: %s", code, talk)
	}
	code, out, _ = call(t.Context(), newStatusCmd())
	for _, want := range []string{"node       node1, kptrace v1", "socket     " + socket, "iptables-nft (default)", "a.yaml: Service shop/x: no ports", "nflog      9 events"} {
		if code != 0 || !strings.Contains(out, want) {
			t.Errorf("exit %d, %q is not in:\n%s", code, want, out)
		}
	}
	code, out, _ = call(t.Context(), newStatusCmd(), "-o", "json")
	var parsed struct{ Nodes []statusJSON }
	if err := json.Unmarshal([]byte(out), &parsed); err != nil || code != 0 || len(parsed.Nodes) != 1 || parsed.Nodes[0].Sources[0].Events != 9 {
		t.Errorf("exit %d, %v:\n%s", code, err, out)
	}
}

func TestPrintFeatures(t *testing.T) {
	all := []features.Feature{{Name: "nflog", Present: true, Required: true, Detail: "works"}, {Name: "veth", Required: true, Fix: "modprobe veth"}}
	var b bytes.Buffer
	err := printFeatures(&b, all, "text")
	if err == nil || !strings.Contains(err.Error(), "cannot work here without: veth") || !strings.Contains(b.String(), "modprobe veth") {
		t.Errorf("%v\n%s", err, b.String())
	}
	b.Reset()
	if err := printFeatures(&b, all[:1], "json"); err != nil || !json.Valid(b.Bytes()) {
		t.Errorf("%v\n%s", err, b.String())
	}
}

func TestFollowEnvironment(t *testing.T) {
	t.Setenv("KPTRACE_NAMESPACE", "shop")
	if got := newFollowCmd().Flag("namespace").DefValue; got != "shop" {
		t.Errorf("namespace %q", got)
	}
}

package text

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

// show runs a whole stream and returns what was printed.
func show(t *testing.T, cfg Config, messages ...trace.Message) (out, talk string) {
	t.Helper()
	var o, e bytes.Buffer
	cfg.Out, cfg.Err, cfg.Location = &o, &e, time.UTC
	if cfg.Now == nil {
		cfg.Now = func() time.Time { return noon.Add(3 * time.Second) }
	}
	stream := make(chan trace.Message, len(messages))
	for _, m := range messages {
		m.Node = "node1"
		stream <- m
	}
	close(stream)
	if err := Run(context.Background(), cfg, stream); err != nil {
		t.Fatal(err)
	}
	return o.String(), e.String()
}

func stream(flows ...*trace.Flow) []trace.Message {
	list := []trace.Message{{Header: headerOf("node1")}}
	for _, f := range flows {
		list = append(list, trace.Message{Flow: f})
	}
	return append(list, trace.Message{End: &trace.End{}})
}

func TestLines(t *testing.T) {
	out, talk := show(t, Config{Format: Line}, stream(every()...)...)
	golden(t, "line.golden", out)
	golden(t, "talk.golden", talk)
	out, _ = show(t, Config{Format: Wide}, stream(every()...)...)
	golden(t, "wide.golden", out)
}

func TestJSON(t *testing.T) {
	out, talk := show(t, Config{Format: JSONL}, stream(every()...)...)
	golden(t, "flows.jsonl", out)
	if want := "18 connections, 9 failed, 0 events lost, 4 not ended\n"; talk != want {
		t.Errorf("talk %q, want %q", talk, want)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	doc, _ := show(t, Config{Format: JSON}, stream(every()...)...)
	var parsed struct {
		SchemaVersion int               `json:"schemaVersion"`
		Flows         []json.RawMessage `json:"flows"`
	}
	if err := json.Unmarshal([]byte(doc), &parsed); err != nil {
		t.Fatal(err)
	}
	if parsed.SchemaVersion != 1 || len(parsed.Flows) != len(lines) {
		t.Fatalf("version %d with %d flows, want 1 with %d", parsed.SchemaVersion, len(parsed.Flows), len(lines))
	}
	empty, _ := show(t, Config{Format: JSON}, stream()...)
	if err := json.Unmarshal([]byte(empty), &parsed); err != nil || parsed.Flows == nil {
		t.Errorf("no flows: %q: %v", empty, err)
	}
}

// TestJSONSchema holds one full flow against the names that are API.
func TestJSONSchema(t *testing.T) {
	f := base(1)
	f.Paths = []trace.Path{{
		Number: 1, Packet: "SYN", Tuple: f.Tuple, Hops: []trace.Hop{
			{Kind: trace.HopWire, Hook: "in", In: "eth0", Time: f.Start, Source: trace.Wire},
			{
				Kind: trace.HopRule, Hook: "prerouting", Table: "nat", Chain: "KUBE-SVC-X", Rule: 3, Handle: 17, Text: "-j KUBE-SEP-Y",
				Purpose: "pick 1 of 3, p = 0.333", Verdict: "jump", Target: "KUBE-SEP-Y", Probability: 1. / 3,
				In: "cbr0", PhysIn: "veth1", Mark: 0x4000, Source: trace.NFTrace,
				Changes: []trace.Change{{Field: "dst", Before: "10.96.0.10:80", After: "10.1.0.2:8080"}},
			},
		},
	}}
	f.Decision.AffinityTimeout, f.Decision.Affinity = 3*time.Hour, trace.AffinityHit
	data, err := json.MarshalIndent(ToJSON(f), "", " ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "schema.json", string(data)+"\n")
}

func TestEachConnectionOnce(t *testing.T) {
	rev := func(n uint32, o trace.Outcome, ended bool) *trace.Flow {
		return with(1, func(f *trace.Flow) { f.Revision, f.Outcome, f.Ended = n, o, ended })
	}
	messages := stream(rev(1, trace.Pending, false), rev(2, trace.Open, false), rev(3, trace.Closed, true), rev(4, trace.Closed, true))
	out, talk := show(t, Config{Format: Line, NoHeader: true}, messages...)
	if n := strings.Count(out, "\n"); n != 1 || !strings.Contains(out, "closed 32ms") {
		t.Errorf("%d rows:\n%s", n, out)
	}
	if talk != "1 connection, 0 failed, 0 events lost\n" {
		t.Errorf("talk %q", talk)
	}
	if out, _ := show(t, Config{Format: Line, NoHeader: true, Updates: true}, messages...); strings.Count(out, "\n") != 4 {
		t.Errorf("with updates:\n%s", out)
	}
	gone := stream(rev(1, trace.Unanswered, false))
	gone = append(gone, trace.Message{Flow: rev(2, trace.Open, false), Gone: true})
	if out, talk := show(t, Config{Format: Line, NoHeader: true}, gone...); out != "" || !strings.HasPrefix(talk, "0 connections") {
		t.Errorf("what no longer matches: %q, %q", out, talk)
	}
}

func TestListByEndpoint(t *testing.T) {
	open := func(id int, ep string) *trace.Flow {
		return with(id, func(f *trace.Flow) {
			f.Outcome, f.Ended, f.Backend.Pod, f.Counted = trace.Open, false, ep, false
		})
	}
	old := every()[12]
	out, _ := show(t, Config{Format: Line, List: true, ByEndpoint: true}, stream(open(1, "foo-a"), old, open(2, "foo-a"))...)
	golden(t, "existing.golden", out)
}

func TestLossAndSilence(t *testing.T) {
	loss := &trace.Loss{Source: trace.NFLog, To: noon.UnixNano(), Events: 12, Where: "kernel"}
	ring := &trace.Loss{To: noon.UnixNano(), Events: 1, Where: "ring"}
	idle := &trace.Idle{
		For: 3 * time.Second, Services: headerOf("node1").Services, Rules: 7, Synced: noon.Add(-time.Minute),
		Last: noon.Add(-2 * time.Second), Others: 4,
		Sources: []trace.SourceStats{{Source: trace.NFLog, Events: 1234}, {Source: trace.Conntrack, Events: 56}},
		Blind:   []string{"connections made straight to an endpoint's address, past the Service"},
	}
	now := noon
	out, talk := show(t, Config{Format: Line, Now: func() time.Time { now = now.Add(3 * time.Second); return now }},
		trace.Message{Header: headerOf("node1")}, trace.Message{Loss: loss}, trace.Message{Loss: ring}, trace.Message{Idle: idle})
	golden(t, "silence.golden", out+"--\n"+talk)
	idle.Rules, idle.Sources, idle.Services[0].Ready, idle.SyncError = 0, nil, 0, "iptables-restore: no"
	_, talk = show(t, Config{Format: Line, Now: func() time.Time { now = now.Add(3 * time.Second); return now }},
		trace.Message{Header: headerOf("node1")}, trace.Message{Idle: idle})
	for _, want := range []string{"would show as rejected", "no rule reports", "the last sync failed: iptables-restore: no", "nothing can be seen"} {
		if !strings.Contains(talk, want) {
			t.Errorf("%q is not in:\n%s", want, talk)
		}
	}
}

// TestDirectIsCounted puts connections past the Service into the last line and the
// JSON document, and with what a check found into what is said of silence.
func TestDirectIsCounted(t *testing.T) {
	end := func(d trace.Direct) trace.Message { return trace.Message{End: &trace.End{Direct: d}} }
	messages := append(stream(base(1)), end(trace.Direct{Pods: 2, Node: 1}), end(trace.Direct{Elsewhere: 4}))
	_, talk := show(t, Config{Format: Line}, messages...)
	if want := "7 connections straight to endpoints, past the Service (2 of pods here, 1 of the node itself, as by probes, 4 from elsewhere, where a Service may have sent them)"; !strings.Contains(talk, want) {
		t.Errorf("%q is not in:\n%s", want, talk)
	}
	doc, _ := show(t, Config{Format: JSON}, messages...)
	var parsed struct {
		Flows  []json.RawMessage
		Direct map[string]int
	}
	if err := json.Unmarshal([]byte(doc), &parsed); err != nil || len(parsed.Flows) != 1 || !maps.Equal(parsed.Direct, map[string]int{"pods": 2, "node": 1, "elsewhere": 4}) {
		t.Errorf("%v: %s", err, doc)
	}
	now := noon
	_, talk = show(t, Config{Format: Line, Now: func() time.Time { now = now.Add(3 * time.Second); return now }},
		trace.Message{Header: headerOf("node1")}, trace.Message{Idle: &trace.Idle{
			For: 3 * time.Second, Direct: trace.Direct{Pods: 5}, Findings: []string{"not-tracked shop/foo:http: rule 1 of raw/PREROUTING"},
		}})
	for _, want := range []string{"5 connections straight to endpoints, past the Service (5 of pods here): --direct shows them", "kptrace check says: not-tracked shop/foo:http: rule 1"} {
		if !strings.Contains(talk, want) {
			t.Errorf("%q is not in:\n%s", want, talk)
		}
	}
	direct := base(2)
	direct.Service.Via, direct.Decision.Known = proxy.ViaDirect, false
	if got := Why(direct); got != "none: the client dialled the endpoint itself" {
		t.Errorf("why is %q", got)
	}
}

func TestSeveralNodes(t *testing.T) {
	two := headerOf("node2")
	two.Notes = []string{"asked for more than there is"}
	out, talk := show(t, Config{Format: Line, Nodes: 3},
		trace.Message{Header: headerOf("node1")}, trace.Message{Header: two}, trace.Message{Flow: base(1)})
	if want := "iptables on node1, node2 (2 of 3 nodes)"; !strings.Contains(talk, want) {
		t.Errorf("talk %q lacks %q", talk, want)
	}
	if !strings.Contains(talk, "note: node2: asked for more") || strings.Count(out, "\n") != 2 {
		t.Errorf("talk %q, out %q", talk, out)
	}
}

func TestNarrow(t *testing.T) {
	for _, width := range []int{40, 80, 100, 132, 200} {
		tab := newTable(false, time.UTC)
		for _, f := range every() {
			row := tab.row(f, noon, width, nil)
			if n := utf8.RuneCountInString(row); n > width && width >= 100 {
				t.Errorf("width %d: %d characters: %s", width, n, row)
			}
		}
	}
	tab := newTable(false, time.UTC)
	if row := tab.row(base(1), noon, 120, nil); !strings.Contains(row, "40312") || !strings.Contains(row, "established") {
		t.Errorf("120 characters lose the essential: %s", row)
	}
}

func TestHostileNames(t *testing.T) {
	f := with(1, func(f *trace.Flow) { f.Client.Pod = "x\x1b[2J\nrow" })
	out, _ := show(t, Config{Format: Line, NoHeader: true}, stream(f)...)
	if strings.ContainsRune(out, 0x1b) || strings.Count(out, "\n") != 1 {
		t.Errorf("%q", out)
	}
}

func TestUnits(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-1: "?", 30 * time.Microsecond: "30µs", 812 * time.Microsecond: "0.8ms", 9949 * time.Microsecond: "9.9ms",
		9960 * time.Microsecond: "10ms", 32 * time.Millisecond: "32ms", 999600 * time.Microsecond: "1.0s",
		1200 * time.Millisecond: "1.2s", 59600 * time.Millisecond: "1m0s", 125 * time.Second: "2m5s",
		time.Hour: "1h0m", 3*time.Hour - 45*time.Second: "2h59m", 76 * time.Hour: "3d4h", 24*time.Hour - time.Second: "1d0h",
	} {
		if got := Duration(d); got != want {
			t.Errorf("%d: %s, want %s", d, got, want)
		}
	}
	for n, want := range map[uint64]string{0: "0B", 999: "999B", 1000: "1.0kB", 4100: "4.1kB", 18000: "18kB", 999_600: "1.0MB", 5e9: "5.0GB"} {
		if got := Bytes(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
	for m, want := range map[Millis]string{0.8123456: "0.812", 32.1: "32.1", 0: "0", 1e9: "1000000000"} {
		if got, err := m.MarshalJSON(); err != nil || string(got) != want {
			t.Errorf("%v: %s, want %s", float64(m), got, want)
		}
	}
}

type brokenPipe struct{}

var errPipe = errors.New("pipe")

func (brokenPipe) Write([]byte) (int, error) { return 0, errPipe }

func TestBrokenPipeEndsRun(t *testing.T) {
	ch := make(chan trace.Message, 2)
	ch <- trace.Message{Header: headerOf("node1")}
	ch <- trace.Message{Flow: base(1)}
	err := Run(context.Background(), Config{Out: brokenPipe{}, Err: &bytes.Buffer{}, Format: JSONL}, ch)
	if !errors.Is(err, errPipe) {
		t.Errorf("got %v", err)
	}
}

// terminal is as much of a terminal as screen uses.
type terminal struct {
	lines []string
	row   int
}

func (x *terminal) Write(p []byte) (int, error) {
	s := string(p)
	for s != "" {
		switch {
		case s[0] == '\n':
			x.row++
			s = s[1:]
		case strings.HasPrefix(s, "\x1b["):
			end := strings.IndexAny(s[2:], "FKJm") + 2
			switch arg := s[2:end]; s[end] {
			case 'F':
				n := 0
				fmt.Sscan(arg, &n)
				x.row -= n
			case 'J':
				x.lines = x.lines[:min(x.row, len(x.lines))]
			}
			s = s[end+1:]
		default:
			end := strings.IndexAny(s, "\n\x1b")
			if end < 0 {
				end = len(s)
			}
			for len(x.lines) <= x.row {
				x.lines = append(x.lines, "")
			}
			x.lines[x.row] = s[:end]
			s = s[end:]
		}
	}
	return len(p), nil
}

func (x *terminal) text() string { return strings.Join(x.lines, "\n") }

func onTerminal(height int) (*renderer, *terminal, *time.Time) {
	now := noon
	x := &terminal{}
	r := newRenderer(Config{
		Out: x, Format: Line, TTY: true, Location: time.UTC, NoHeader: true,
		Size: func() (int, int) { return 160, height }, Now: func() time.Time { return now },
	})
	return r, x, &now
}

func (r *renderer) step(flows ...*trace.Flow) {
	for _, f := range flows {
		r.take(trace.Message{Node: "node1", Flow: f})
	}
	r.tick()
}

func TestTerminalUpdatesInPlace(t *testing.T) {
	r, x, _ := onTerminal(10)
	state := func(id int, o trace.Outcome, ended bool) *trace.Flow {
		return with(id, func(f *trace.Flow) {
			f.Client.Addr = with(1, func(*trace.Flow) {}).Client.Addr
			f.Client.Pod = fmt.Sprintf("web-%d", id)
			f.Outcome, f.Ended, f.Counted = o, ended, false
		})
	}
	r.step(state(1, trace.Pending, false), state(2, trace.Pending, false))
	r.step(state(2, trace.Closed, true))
	if len(x.lines) != 2 || !strings.Contains(x.lines[0], "no answer yet") || !strings.Contains(x.lines[1], "closed 32ms") {
		t.Fatalf("got:\n%s", x.text())
	}
	for id := 3; id < 8; id++ {
		r.step(state(id, trace.Closed, true))
	}
	r.step(state(1, trace.Open, false))
	if len(x.lines) != 7 || !strings.Contains(x.lines[0], "web-1") || !strings.Contains(x.lines[0], "established") {
		t.Fatalf("the first row was not updated in place:\n%s", x.text())
	}
	// Too far up to be reached: the last word comes as a row of its own.
	for id := 8; id < 14; id++ {
		r.step(state(id, trace.Closed, true))
	}
	r.step(state(1, trace.Closed, true))
	if n := strings.Count(x.text(), "web-1:"); n != 2 || !strings.Contains(x.lines[len(x.lines)-1], "web-1:") {
		t.Fatalf("%d rows for the first:\n%s", n, x.text())
	}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	for id := 2; id < 14; id++ {
		if n := strings.Count(x.text(), fmt.Sprintf("web-%d:", id)); n != 1 {
			t.Errorf("web-%d is there %d times", id, n)
		}
	}
}

func TestTerminalFoldsGoodConnections(t *testing.T) {
	r, x, now := onTerminal(24)
	id, bad := 0, 0
	for range 4 {
		for n := range 100 {
			id++
			f := with(id, func(f *trace.Flow) { f.Client.Pod = "good" })
			if n%10 == 9 {
				bad++
				f = with(id, func(f *trace.Flow) { failed(f, trace.Refused, trace.EndpointRefused, 0); f.Client.Pod = "bad" })
			}
			*now = now.Add(5 * time.Millisecond)
			r.step(f)
		}
		*now = now.Add(500 * time.Millisecond)
	}
	// A folded connection that fails later gets its row.
	id++
	late := id
	for range 30 {
		r.step(with(id, func(f *trace.Flow) { f.Outcome, f.Ended, f.Client.Pod = trace.Open, false, "late" }))
		id++
	}
	late += 29
	r.step(with(late, func(f *trace.Flow) {
		f.Outcome, f.Reason, f.Client.Pod = trace.Reset, trace.ResetByEndpoint, "late-bad"
	}))
	if n := strings.Count(x.text(), "bad:"); n != bad+1 {
		t.Errorf("%d failures have a row, want %d", n, bad+1)
	}
	if n := strings.Count(x.text(), "good:"); n > 5*rowsPerSecond {
		t.Errorf("%d good ones have a row", n)
	}
	if !strings.Contains(x.lines[len(x.lines)-1], "more, not failed, without a row") {
		t.Errorf("no counter:\n%s", x.text())
	}
	*now = now.Add(3 * time.Second)
	r.tick()
	if strings.Contains(x.text(), "without a row") || !strings.Contains(x.text(), "connections more, not failed, from 12:00:00") {
		t.Errorf("the burst was not closed:\n%s", x.text())
	}
	r.headers = []*trace.Header{headerOf("node1")}
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("430 connections, %d failed", bad+1); !strings.Contains(x.text(), want) {
		t.Errorf("%q is not in the summary: %s", want, x.lines[len(x.lines)-1])
	}
}

func TestColour(t *testing.T) {
	f := with(1, func(f *trace.Flow) { failed(f, trace.Refused, trace.EndpointRefused, 0) })
	out, _ := show(t, Config{Format: Line, NoHeader: true, Colour: true}, stream(f)...)
	if !strings.Contains(out, "\x1b[31mrefused by endpoint\x1b[0m") {
		t.Errorf("%q", out)
	}
	if got := cutColoured(faint("abcdef"), 4); got != "\x1b[2mabc…\x1b[0m" {
		t.Errorf("%q", got)
	}
}

func TestDecisionWords(t *testing.T) {
	for want, change := range map[string]func(d *trace.Decision){
		"random 0.5 %, 1 of 200": func(d *trace.Decision) { d.Probability, d.Candidates = 0.005, 200 },
		"lc, 1 of 3":             func(d *trace.Decision) { d.Algorithm, d.Probability = "lc", 0 },
		"round robin, 1 of 3":    func(d *trace.Decision) { d.Mode, d.Algorithm, d.Probability = proxy.IPVS, "rr", 0 },
		"least-conn: 2 of [2 5 7], sampled": func(d *trace.Decision) {
			d.Mode, d.Algorithm, d.Probability = proxy.IPVS, "lc", 0
			d.Load = &trace.Load{Servers: []trace.ServerLoad{{Active: 2, Weight: 1}, {Active: 5, Weight: 1}, {Active: 7, Weight: 1}}}
		},
		"weighted least-conn: 5/3 of [2/1 5/3], sampled": func(d *trace.Decision) {
			d.Mode, d.Algorithm, d.Probability = proxy.IPVS, "wlc", 0
			d.Load = &trace.Load{Picked: 1, Servers: []trace.ServerLoad{{Active: 2, Weight: 1}, {Active: 5, Weight: 3}}}
		},
		"source hash, 1 of 3, by direct routing": func(d *trace.Decision) {
			d.Mode, d.Algorithm, d.Probability, d.Forwarding = proxy.IPVS, "sh", 0, trace.ForwardDirect
		},
		"random 33 %, 1 of 3, terminating endpoints only":     func(d *trace.Decision) { d.Policy = "terminating" },
		"random 33 %, 1 of 3, masqueraded":                    func(d *trace.Decision) { d.Masquerade = "marked" },
		"affinity evicted, random 33 %, 1 of 3":               func(d *trace.Decision) { d.Affinity = trace.AffinityEvicted },
		"unknown (no evidence)":                               func(d *trace.Decision) { *d = trace.Decision{} },
		"random 33 %, 1 of 3 (affinity unknown: events lost)": func(d *trace.Decision) { d.Note = "affinity unknown: events lost" },
	} {
		f := base(1)
		f.Decision.Excluded = proxy.Excluded{}
		change(&f.Decision)
		if got := Why(f); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestDetail(t *testing.T) {
	var b strings.Builder
	for i, f := range every() {
		if i != 1 && i != 2 && i != 6 && i != 12 {
			continue
		}
		if err := Detail(&b, f, noon.Add(time.Minute), time.UTC); err != nil {
			t.Fatal(err)
		}
		b.WriteString("----\n")
	}
	golden(t, "detail.golden", b.String())
}

// traced is a flow whose SYN was traced.
func traced(id int, change func(f *trace.Flow)) *trace.Flow {
	return with(id, func(f *trace.Flow) {
		f.Paths = []trace.Path{{
			Number: 1, Packet: "SYN", Tuple: f.Tuple, Left: f.Tuple.WithDst(f.Backend.Addr), Hops: []trace.Hop{
				{Kind: trace.HopWire, Hook: "in", In: "eth0", Time: f.Start},
				{Kind: trace.HopPolicy, Hook: "prerouting", Table: "raw", Chain: "PREROUTING", Verdict: "accept", In: "eth0"},
				{Kind: trace.HopRule, Hook: "prerouting", Table: "nat", Chain: "PREROUTING", Rule: 1, Text: "-j KUBE-SERVICES", Purpose: "see whether it is for a Service", Verdict: "jump", Target: "KUBE-SERVICES", In: "cbr0", PhysIn: "veth1"},
				{Kind: trace.HopRule, Hook: "prerouting", Table: "nat", Chain: "KUBE-SERVICES", Rule: 3, Text: "-d 10.96.0.10/32 -j KUBE-SVC-X", Purpose: "cluster IP of shop/foo:http", Verdict: "jump", Target: "KUBE-SVC-X"},
				{Kind: trace.HopEnd, Hook: "prerouting", Table: "nat", Chain: "KUBE-SVC-X", Verdict: "return"},
				{Kind: trace.HopRule, Hook: "prerouting", Table: "nat", Chain: "KUBE-SERVICES", Rule: 4, Text: "-j DNAT --to-destination 10.244.2.7:8080", Purpose: "DNAT to foo-5c 10.244.2.7:8080", Verdict: "dnat", Changes: []trace.Change{{Field: "dst", Before: "10.96.0.10:80", After: "10.244.2.7:8080"}}},
				{Kind: trace.HopRoute, Purpose: "routed", Changes: []trace.Change{{Field: "ttl", Before: "64", After: "63"}}},
				{Kind: trace.HopRule, Hook: "forward", Table: "filter", Chain: "FORWARD", Verdict: "drop", Text: "-j DROP", In: "eth0", Out: "cbr0", PhysOut: "veth2"},
				{Kind: trace.HopWire, Hook: "out", Out: "veth2", Time: f.Start.Add(42 * time.Microsecond)},
			},
		}}
		change(f)
	})
}

func TestTree(t *testing.T) {
	f := traced(1, func(*trace.Flow) {})
	f.Paths = append(f.Paths, trace.Path{Predicted: true, Packet: "SYN", Probability: 0.25, Tuple: f.Tuple, Incomplete: true})
	golden(t, "tree.txt", Tree(&f.Paths[0])+Tree(&f.Paths[1]))
}

// TestPathsAreWaitedFor shows a connection when its path has come, or when it no
// longer does, and each only once.
func TestPathsAreWaitedFor(t *testing.T) {
	now := noon
	var o, e bytes.Buffer
	r := newRenderer(Config{Format: Path, Paths: true, NoHeader: true, Out: &o, Err: &e, Now: func() time.Time { return now }, Location: time.UTC})
	r.take(trace.Message{Header: headerOf("node1")})
	after := func(d time.Duration) string {
		now = now.Add(d)
		r.tick()
		s := o.String()
		o.Reset()
		return s
	}
	flow := func(f *trace.Flow) { r.take(trace.Message{Node: "node1", Flow: f}) }

	flow(with(1, func(*trace.Flow) {}))
	if s := after(500 * time.Millisecond); s != "" {
		t.Errorf("shown before its path came:\n%s", s)
	}
	flow(traced(1, func(f *trace.Flow) { f.Revision++ }))
	if s := after(600 * time.Millisecond); strings.Count(s, "shop/web") != 1 || !strings.Contains(s, "cluster IP of shop/foo:http") {
		t.Errorf("shown with its path:\n%s", s)
	}
	flow(traced(1, func(f *trace.Flow) { f.Revision += 2 })) // a correction
	flow(with(2, func(*trace.Flow) {}))
	if s := after(7 * time.Second); s != "" {
		t.Errorf("shown again, or too early:\n%s", s)
	}
	if s := after(2 * time.Second); strings.Count(s, "shop/web") != 1 || strings.Contains(s, "cluster IP of") {
		t.Errorf("one whose path never came:\n%s", s)
	}
	answer := traced(6, func(f *trace.Flow) {
		f.Paths = slices.Clone(f.Paths)
		f.Paths[0].Reply = true
	})
	flow(answer)
	if s := after(2 * time.Second); s != "" {
		t.Errorf("shown when only the way of the answer was there:\n%s", s)
	}
	flow(traced(6, func(f *trace.Flow) { f.Revision++ }))
	if s := after(time.Millisecond); strings.Count(s, "shop/web") != 1 || !strings.Contains(s, "cluster IP of") {
		t.Errorf("shown with the way there:\n%s", s)
	}
	open := func(f *trace.Flow) { f.Ended, f.Outcome, f.Duration = false, trace.Open, -1 }
	flow(traced(3, open))
	if s := after(3 * time.Second); !strings.Contains(s, "cluster IP of shop/foo:http") {
		t.Errorf("one that goes on:\n%s", s)
	}
	flow(traced(3, func(f *trace.Flow) { f.Revision++ }))
	if s := after(time.Millisecond); strings.Count(s, "shop/web") != 1 || strings.Contains(s, "cluster IP of") {
		t.Errorf("its end, without the tree a second time:\n%s", s)
	}
	flow(with(4, func(*trace.Flow) {}))
	flow(traced(5, open))
	if err := r.end(); err != nil {
		t.Fatal(err)
	}
	if s := o.String(); strings.Count(s, "shop/web") != 2 || strings.Count(s, "cluster IP of") != 1 {
		t.Errorf("what is left at the end:\n%s", s)
	}
	if !strings.HasPrefix(e.String(), "6 connections") {
		t.Errorf("summary: %s", e.String())
	}
}

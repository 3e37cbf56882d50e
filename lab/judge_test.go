package lab

import (
	"bytes"
	"encoding/json"
	"math"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

var (
	web   = netip.MustParseAddr("10.244.1.10")
	epoch = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
)

// truth is a run of ten connections to foo and six to sticky, as reports and
// as flows that agree with them.
func truth() Evidence {
	c := &Cluster{Services: []Service{
		{Namespace: "shop", Name: "foo", Port: "http", Proto: conntrack.TCP, ClusterIP: netip.MustParseAddr("10.96.0.10"), Number: 80},
		{Namespace: "shop", Name: "sticky", Proto: conntrack.TCP, ClusterIP: netip.MustParseAddr("10.96.0.11"), Number: 80, Affinity: true},
	}}
	e := Evidence{Cluster: c, Lost: map[string]uint64{"nflog": 0}}
	add := func(s *Service, i int, pod string, last byte, d trace.Decision) {
		start := epoch.Add(time.Duration(i) * time.Second)
		local := netip.AddrPortFrom(web, uint16(40000+i))
		r := Report{Client: "shop/web", Start: start, End: start.Add(5 * time.Millisecond), Proto: conntrack.TCP, Local: local,
			Remote: netip.AddrPortFrom(s.ClusterIP, 80), Server: "shop/" + pod, Seen: local, Established: time.Millisecond}
		d.Known, d.SourceSeen = true, local
		f := &trace.Flow{ID: trace.FlowID(100*i + int(last)), Start: start, Tuple: r.Tuple(), Client: trace.Peer{Addr: local},
			Service: trace.ServiceRef{Name: proxy.PortName{Namespace: "shop", Name: s.Name, Port: s.Port, Proto: conntrack.TCP}},
			Backend: trace.Peer{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, 1, last}), 8080), Namespace: "shop", Pod: pod},
			Outcome: trace.Closed, Decision: d, Established: time.Duration(i+1) * time.Millisecond}
		e.Reports = append(e.Reports, r)
		e.Flows = append(e.Flows, f)
	}
	for i := range 10 {
		pod, last := "a", byte(21)
		if i >= 4 {
			pod, last = "b", 22
		}
		add(&c.Services[0], i, pod, last, trace.Decision{Probability: 0.5, Candidates: 2, Affinity: trace.AffinityNone})
	}
	for i := range 6 {
		word := trace.AffinityHit
		if i == 0 {
			word = trace.AffinityNew
		}
		add(&c.Services[1], 20+i, "a", 21, trace.Decision{Affinity: word, AffinityTimeout: time.Hour})
	}
	return e
}

func TestJudgeAgrees(t *testing.T) {
	s := Judge(truth())
	if !s.OK() || s.Made != 16 || len(s.Details) > 0 || len(s.Services) != 2 {
		t.Fatalf("summary of the truth: %+v", s)
	}
	foo, sticky := s.Services[0], s.Services[1]
	if foo.Connections != 10 || foo.Outcomes["closed"] != 10 || *foo.EstablishedMs != (Percentiles{5, 10}) {
		t.Errorf("foo: %+v %+v", foo, foo.EstablishedMs)
	}
	near := func(a, b float64) bool { return math.Abs(a-b) < 1e-9 }
	if a, b := foo.Endpoints[0], foo.Endpoints[1]; a.Pod != "a" || a.IP != "10.244.1.21" || a.Connections != 4 ||
		!near(a.Share, 0.4) || !near(b.Share, 0.6) || !near(a.ExpectedShare, 0.5) || !near(b.ExpectedShare, 0.5) {
		t.Errorf("foo's endpoints: %+v", foo.Endpoints)
	}
	if e := sticky.Endpoints; len(e) != 1 || !near(e[0].Share, 1) || !near(e[0].ExpectedShare, 1) {
		t.Errorf("sticky's endpoints: %+v", e)
	}
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`{"namespace":"shop","name":"foo","port":"http","connections":10,"outcomes":{"closed":10},"retried":0,"endpoints":[{"pod":"a","ip":"10.244.1.21","connections":4,"share":0.4,"expectedShare":0.5}`,
		`"establishedMs":{"p50":5,"p99":10}`, `"lost":{"nflog":0}`, `"serverMismatch":0,"missing":0`,
	} {
		if !bytes.Contains(b, []byte(want)) {
			t.Errorf("JSON lacks %s:\n%s", want, b)
		}
	}
	var text strings.Builder
	if err := s.WriteText(&text); err != nil || !strings.Contains(text.String(), "all 16 connections were shown once") {
		t.Errorf("%v\n%s", err, text.String())
	}
}

// Each way of telling a lie is noticed, and counted where it belongs.
func TestJudgeNotices(t *testing.T) {
	for name, tt := range map[string]struct {
		lie  func(*Evidence)
		want func(*Summary) *int
	}{
		"missing":      {func(e *Evidence) { e.Flows = e.Flows[1:] }, func(s *Summary) *int { return &s.Missing }},
		"other time":   {func(e *Evidence) { e.Reports[0].Start, e.Reports[0].End = epoch.Add(time.Hour), epoch.Add(time.Hour) }, nil},
		"twice":        {func(e *Evidence) { f := *e.Flows[0]; f.ID++; e.Flows = append(e.Flows, &f) }, func(s *Summary) *int { return &s.Duplicates }},
		"wrong pod":    {func(e *Evidence) { e.Flows[3].Backend.Pod = "b" }, func(s *Summary) *int { return &s.ServerMismatch }},
		"wrong source": {func(e *Evidence) { e.Flows[3].Decision.SourceSeen = netip.MustParseAddrPort("1.2.3.4:5") }, func(s *Summary) *int { return &s.ServerMismatch }},
		"refused":      {func(e *Evidence) { e.Flows[2].Outcome = trace.Refused }, func(s *Summary) *int { return &s.OutcomeMismatch }},
		"not refused": {func(e *Evidence) {
			e.Reports[2].Err, e.Reports[2].Server, e.Reports[2].Established = FailRefused, "", -1
		}, func(s *Summary) *int { return &s.OutcomeMismatch }},
		"unknown":         {func(e *Evidence) { e.Flows[2].Outcome = trace.Unknown }, func(s *Summary) *int { return &s.OutcomeMismatch }},
		"affinity lost":   {func(e *Evidence) { e.Flows[12].Decision.Affinity = trace.AffinityNew }, func(s *Summary) *int { return &s.AffinityMismatch }},
		"affinity early":  {func(e *Evidence) { e.Flows[10].Decision.Affinity = trace.AffinityHit }, func(s *Summary) *int { return &s.AffinityMismatch }},
		"affinity of foo": {func(e *Evidence) { e.Flows[0].Decision.Affinity = trace.AffinityHit }, func(s *Summary) *int { return &s.AffinityMismatch }},
		"affinity expired": {func(e *Evidence) { e.Flows[12].Decision.Affinity = trace.AffinityExpired },
			func(s *Summary) *int { return &s.AffinityMismatch }},
	} {
		e := truth()
		tt.lie(&e)
		s := Judge(e)
		if s.OK() || len(s.Details) == 0 {
			t.Errorf("%s: not noticed: %+v", name, s)
			continue
		}
		if tt.want == nil {
			continue
		}
		if n := tt.want(s); *n != 1 {
			t.Errorf("%s: counted elsewhere: %+v", name, s)
		} else if *n = 0; !s.OK() {
			t.Errorf("%s: counted elsewhere too: %+v", name, s)
		}
	}
}

// A port that is used again makes another connection; a UDP port used again
// soon does not.
func TestJudgePortReuse(t *testing.T) {
	e := truth()
	e.Reports[5].Local, e.Reports[5].Seen = e.Reports[0].Local, e.Reports[0].Seen
	e.Flows[5].Tuple, e.Flows[5].Decision.SourceSeen = e.Flows[0].Tuple, e.Reports[0].Local
	if s := Judge(e); !s.OK() {
		t.Errorf("TCP: %+v", s)
	}
	e = truth()
	e.Cluster.Services = append(e.Cluster.Services, Service{Name: "dns", Proto: conntrack.UDP, ClusterIP: netip.MustParseAddr("10.96.0.53"), Number: 53})
	r := e.Reports[0]
	r.Proto, r.Remote = conntrack.UDP, netip.MustParseAddrPort("10.96.0.53:53")
	f := *e.Flows[0]
	f.ID, f.Tuple = 9999, r.Tuple()
	again := r
	again.Start, again.End = r.Start.Add(time.Second), r.End.Add(time.Second)
	e.Reports, e.Flows = append(e.Reports, r, again), append(e.Flows, &f)
	if s := Judge(e); !s.OK() || s.Made != 18 {
		t.Errorf("UDP: %+v", s)
	}
}

func TestParseTarget(t *testing.T) {
	for in, want := range map[string]string{
		"web": "pod/shop/web", "pod/web": "pod/shop/web", "po/web": "pod/shop/web", "pod/other/web": "pod/other/web",
		"node/node1": "node/node1", "no/node1": "node/node1",
		"": "", "svc/foo": "", "pod/": "", "node/": "", "pod/a/b/c": "", "node/a/b": "",
	} {
		got, err := ParseTarget(in, "shop")
		if got != want || (err == nil) != (want != "") {
			t.Errorf("ParseTarget(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
}

package main

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/lab"
)

// judged checks a summary: all was shown once and rightly, and outcomes,
// endpoints and shares are what the demo scenario makes.
func judged(t *testing.T, text string) {
	t.Helper()
	var s lab.Summary
	dec := json.NewDecoder(strings.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	if !s.OK() || s.Made < 40 {
		t.Errorf("made %d, summary %s", s.Made, text)
	}
	if _, ok := s.Lost["nflog"]; !ok || len(s.Lost) < 2 {
		t.Errorf("lost names no sources: %v", s.Lost)
	}
	for source, n := range s.Lost {
		if n != 0 {
			t.Errorf("%s lost %d events", source, n)
		}
	}
	for name, want := range map[string]struct {
		outcomes []string // each must be there, and nothing else
		pods     []string
		affinity bool
	}{
		"shop/foo:http":    {[]string{"closed"}, []string{"foo-1", "foo-2", "foo-3"}, false},
		"shop/sticky:http": {[]string{"closed"}, []string{"foo-1", "foo-2", "foo-3"}, true},
		"shop/front:http":  {[]string{"closed"}, []string{"foo-1", "foo-2"}, false},
		"shop/flaky:http":  {[]string{"closed", "refused"}, []string{"foo-3", "dead"}, false},
		"shop/empty:http":  {[]string{"rejected"}, nil, false},
		"shop/dns:dns":     {[]string{"open", "closed"}, []string{"dns-1", "dns-2"}, false},
	} {
		v := service(&s, name)
		if v == nil {
			t.Errorf("%s is not in %s", name, text)
			continue
		}
		sum := 0
		for o, n := range v.Outcomes {
			sum += n
			if !strings.Contains(strings.Join(want.outcomes, " "), o) {
				t.Errorf("%s: %d %s", name, n, o)
			}
		}
		if sum != v.Connections || v.Connections == 0 {
			t.Errorf("%s: %d connections, outcomes %v", name, v.Connections, v.Outcomes)
		}
		shares(t, name, v, want.pods, want.affinity)
		established := v.Outcomes["closed"]+v.Outcomes["open"] > 0 // chance may pick the dead endpoint only
		if p := v.EstablishedMs; (p != nil) != established || p != nil && (p.P50 <= 0 || p.P99 < p.P50 || p.P99 > 1000) {
			t.Errorf("%s: time to establish %+v", name, p)
		}
	}
	if len(s.Services) != 6 {
		t.Errorf("%d Services, want 6", len(s.Services))
	}
}

func service(s *lab.Summary, name string) *lab.ServiceSummary {
	for i := range s.Services {
		if v := &s.Services[i]; v.Namespace+"/"+v.Name+":"+v.Port == name {
			return v
		}
	}
	return nil
}

func shares(t *testing.T, name string, v *lab.ServiceSummary, pods []string, affinity bool) {
	t.Helper()
	if len(v.Endpoints) != len(pods) {
		t.Errorf("%s: endpoints %+v, want %v", name, v.Endpoints, pods)
	}
	if len(v.Endpoints) == 0 {
		return
	}
	share, expected, n := 0.0, 0.0, 0
	for i, e := range v.Endpoints {
		share, expected, n = share+e.Share, expected+e.ExpectedShare, n+e.Connections
		if i < len(pods) && e.Pod != pods[i] {
			t.Errorf("%s: endpoint %d is %s, want %s", name, i, e.Pod, pods[i])
		}
		if !affinity && math.Abs(e.ExpectedShare-1/float64(len(pods))) > 1e-3 {
			t.Errorf("%s: %s should get %v of all, want 1/%d", name, e.Pod, e.ExpectedShare, len(pods))
		}
	}
	if math.Abs(share-1) > 1e-6 || math.Abs(expected-1) > 1e-3 || n != v.Connections {
		t.Errorf("%s: shares add up to %v, expected shares to %v, connections to %d of %d", name, share, expected, n, v.Connections)
	}
}

func TestDemoJSON(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	out := d.must("lab", "run", "--for", "6s", "-o", "json", "--iptables-flavour", "nft")
	if strings.Count(out, "\n") != 1 {
		t.Errorf("not one line:\n%s", out)
	}
	judged(t, out)
}

// TestDemoLines takes the summary's word for nothing: the lines themselves
// are held against each client's own history.
func TestDemoLines(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	out := d.must("lab", "run", "--for", "6s", "-o", "jsonl", "--iptables-flavour", "legacy")
	lines := strings.SplitAfter(strings.TrimSpace(out), "\n")
	last := len(lines) - 1
	judged(t, lines[last])
	var s lab.Summary
	if err := json.Unmarshal([]byte(lines[last]), &s); err != nil {
		t.Fatal(err)
	}
	list := flows(t, strings.Join(lines[:last], ""))
	if len(list) != s.Made {
		t.Errorf("%d lines of %d connections", len(list), s.Made)
	}
	type client struct{ pod, service string }
	pinned := map[client]string{}
	ids := map[string]bool{}
	for i := range list {
		f := &list[i]
		if ids[f.ID] {
			t.Errorf("%s is shown twice", f.ID)
		}
		ids[f.ID] = true
		checkDecision(t, f)
		if f.Service.Name != "sticky" {
			continue
		}
		k := client{f.Client.Pod, f.Service.Name}
		switch had := pinned[k]; {
		case had == "" && f.Decision.Affinity != "new", had != "" && f.Decision.Affinity != "hit":
			t.Errorf("%v had %q before: affinity %q", k, had, f.Decision.Affinity)
		case had != "" && had != f.pod():
			t.Errorf("%v went to %s, then to %s", k, had, f.pod())
		}
		pinned[k] = f.pod()
	}
	if len(pinned) != 2 {
		t.Errorf("clients with affinity: %v, want 2", pinned)
	}
}

// checkDecision checks what one line says against the scenario.
func checkDecision(t *testing.T, f *flowLine) {
	t.Helper()
	d := &f.Decision
	via, masquerade, candidates := "ClusterIP", "no", map[string]int{"foo": 3, "sticky": 3, "front": 2, "flaky": 2, "dns": 2}[f.Service.Name]
	if f.Service.Name == "front" {
		via, masquerade = "NodePort", "external"
	}
	if f.Service.Name == "empty" {
		if f.Backend != nil || f.Outcome != "rejected" {
			t.Errorf("%+v; want rejected, without backend", f)
		}
		return
	}
	if f.Service.Via != via || d.Candidates != candidates || d.Masquerade != masquerade || d.Excluded.NotReady != map[string]int{"foo": 1}[f.Service.Name] {
		t.Errorf("%s: via %s, %+v", f.Service.Name, f.Service.Via, d)
	}
	switch {
	case d.Affinity == "hit":
		if d.Probability != nil && *d.Probability != 1 {
			t.Errorf("%s: a hit, by chance %v", f.Service.Name, *d.Probability)
		}
	case d.Probability == nil || math.Abs(*d.Probability-1/float64(candidates)) > 1e-3:
		t.Errorf("%s: probability %v of %d candidates", f.Service.Name, d.Probability, candidates)
	}
	if want := f.pod() == "dead"; want != (f.Outcome == "refused") {
		t.Errorf("%s: %s at %s", f.Service.Name, f.Outcome, f.pod())
	}
}

// TestDemoKernelTimeouts keeps the kernel's own conntrack timeouts, in which
// an entry outlives its connection by minutes: flows end by what was seen of
// them.
func TestDemoKernelTimeouts(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	began := time.Now()
	out := d.must("lab", "run", "--for", "4s", "-o", "jsonl", "--kernel-timeouts")
	lines := strings.SplitAfter(strings.TrimSpace(out), "\n")
	last := len(lines) - 1
	var s lab.Summary
	if err := json.Unmarshal([]byte(lines[last]), &s); err != nil || !s.OK() || s.Made < 25 {
		t.Errorf("%v: %s", err, lines[last])
	}
	if took := time.Since(began); took > 25*time.Second {
		t.Errorf("it took %v", took)
	}
	closed := 0
	list := flows(t, strings.Join(lines[:last], ""))
	for i := range list {
		f := &list[i]
		if f.Proto == "tcp" && f.Outcome == "closed" {
			closed++
			if f.DurationMs == nil || *f.DurationMs > 1000 {
				t.Errorf("closed after %v ms", f.DurationMs)
			}
		}
		if f.Proto == "tcp" && !f.Ended {
			t.Errorf("a TCP connection has not ended: %+v", f)
		}
	}
	if closed < 20 {
		t.Errorf("%d TCP connections closed of %d", closed, len(list))
	}
}

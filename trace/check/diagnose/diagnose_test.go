package diagnose_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
	"github.com/kptrace/kptrace/trace/check"
	"github.com/kptrace/kptrace/trace/check/diagnose"
)

func flow(n int, client, backend, node string, o trace.Outcome, why trace.Reason) *trace.Flow {
	return &trace.Flow{
		ID: trace.FlowID(n), Start: time.Unix(int64(n), 0), Outcome: o, Reason: why,
		Client:   trace.Peer{Addr: netip.MustParseAddrPort("10.1.0.1:1"), Namespace: "shop", Pod: client, Node: "node9"},
		Backend:  trace.Peer{Addr: netip.MustParseAddrPort("10.1.0.2:80"), Namespace: "shop", Pod: backend, Node: node},
		Service:  trace.ServiceRef{Name: proxy.PortName{Namespace: "shop", Name: "foo", Port: "http", Proto: conntrack.TCP}},
		Decision: trace.Decision{Known: true, Algorithm: "random", Candidates: 20, Probability: 0.05},
	}
}

// shop is a Service with 20 endpoints, of which bad decides what fails.
func shop(bad func(i int, client, backend, node string) trace.Reason) []*trace.Flow {
	var flows []*trace.Flow
	for i := range 400 {
		client, backend, node := fmt.Sprintf("web-%d", i%7), fmt.Sprintf("foo-%d", i%20), fmt.Sprintf("node%d", i%20%4)
		o, why := trace.Closed, bad(i, client, backend, node)
		if why != "" {
			o = trace.Timeout
		}
		flows = append(flows, flow(i+1, client, backend, node, o, why))
	}
	return flows
}

func TestDiagnose(t *testing.T) {
	for _, c := range []struct {
		name string
		bad  func(i int, client, backend, node string) trace.Reason
		by   diagnose.By
		want []string
	}{
		{"one endpoint", func(_ int, _, b, _ string) trace.Reason { return when(b == "foo-5", trace.SynUnanswered) },
			diagnose.Backend, []string{"20 of 20 failures: endpoint shop/foo-5:80 on node1, syn unanswered", "1 of 20 endpoints, so one in 20"}},
		{"one client", func(_ int, c, _, _ string) trace.Reason { return when(c == "web-3", trace.SourceRange) },
			diagnose.Client, []string{"client shop/web-3, source range", "no connection with it was good"}},
		{"one node", func(_ int, _, _, n string) trace.Reason { return when(n == "node2", trace.SynUnanswered) },
			diagnose.Node, []string{"endpoints on node2"}},
		{"all", func(int, string, string, string) trace.Reason { return trace.NotForwarded }, "", []string{"no connection was good"}},
		{"at random", func(i int, _, _, _ string) trace.Reason { return when(i%9 == 0, trace.ResetByEndpoint) },
			"", []string{"share neither endpoint, client nor node"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := diagnose.Diagnose(shop(c.bad), nil)
			if len(r.Findings) != 1 || r.Total != 400 {
				t.Fatalf("got %+v", r)
			}
			f := r.Findings[0]
			if f.By != c.by {
				t.Errorf("by %q, want %q: %s", f.By, c.by, f.Text)
			}
			for _, w := range c.want {
				if !strings.Contains(f.Text, w) {
					t.Errorf("%q is not in %q", w, f.Text)
				}
			}
			if f.Next == "" || len(f.Flows) == 0 {
				t.Errorf("no next step or no flows: %+v", f)
			}
		})
	}
}

func when(b bool, r trace.Reason) trace.Reason {
	if b {
		return r
	}
	return ""
}

// TestNotices tells of what went wrong without a failure, and apart from failures.
func TestNotices(t *testing.T) {
	flows := shop(func(i int, _, _, _ string) trace.Reason { return when(i%9 == 0, trace.ResetByEndpoint) })
	marked := 0
	for _, f := range flows {
		if !f.Outcome.Failed() && marked < 3 {
			f.Reason, marked = trace.AffinityForgotten, marked+1
		}
	}
	r := diagnose.Diagnose(flows, nil)
	want := fmt.Sprintf("3 of %d connections that did not fail: affinity forgotten", r.Total-r.Failed)
	if len(r.Findings) != 1 || r.Findings[0].Reason != trace.ResetByEndpoint || len(r.Noticed) != 1 || r.Noticed[0].Text != want || r.Noticed[0].Flow == "" {
		t.Errorf("findings %+v, noticed %+v", r.Findings, r.Noticed)
	}
}

func TestRankAndCheck(t *testing.T) {
	flows := shop(func(i int, _, b, _ string) trace.Reason {
		switch {
		case b == "foo-5":
			return trace.SynUnanswered
		case i == 7:
			return trace.ResetByClient
		}
		return ""
	})
	r := diagnose.Diagnose(flows, []check.Finding{
		{Code: "odds-missing", Severity: check.Breaks, Object: "shop/foo:http"},
		{Code: "odds-missing", Severity: check.Breaks, Object: "shop/bar:http"},
		{Code: "conntrack-near-full", Severity: check.Risk, Object: "net.netfilter.nf_conntrack_max"},
		{Code: "rp-filter", Severity: check.Note, Object: "net.ipv4.conf.all.rp_filter"},
	})
	if len(r.Findings) != 2 || r.Findings[0].Failures != 20 || r.Findings[1].Failures != 1 {
		t.Errorf("got %+v", r.Findings)
	}
	if len(r.Check) != 2 || r.Check[0].Object != "shop/foo:http" {
		t.Errorf("check: %+v", r.Check)
	}
	rows := diagnose.Summary(flows, []diagnose.By{diagnose.Backend, diagnose.Reason})
	if rows[0].Values[0] != "shop/foo-5:80" || rows[0].Failed != 20 || rows[0].Connections != 20 {
		t.Errorf("got %+v", rows[0])
	}
}

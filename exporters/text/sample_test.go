package text

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares got with a file of testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs; got:\n%s\nwant:\n%s", name, got, want)
	}
}

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// base is a connection that went well.
func base(id int) *trace.Flow {
	ap := netip.MustParseAddrPort
	backend := trace.Peer{Addr: ap("10.244.2.7:8080"), Namespace: "shop", Pod: "foo-5c", Node: "node2"}
	f := &trace.Flow{
		ID: trace.FlowID(id), Revision: 3, Start: noon.Add(time.Duration(id) * 123 * time.Millisecond), Node: "node1",
		Tuple:  conntrack.NewTuple(conntrack.TCP, ap("10.244.1.5:40312"), ap("10.96.0.10:80")),
		Client: trace.Peer{Addr: ap("10.244.1.5:40312"), Namespace: "shop", Pod: "web-7f9", Node: "node1", Workload: "Deployment/web"},
		Service: trace.ServiceRef{
			Name: proxy.PortName{Namespace: "shop", Name: "foo", Port: "http", Proto: conntrack.TCP},
			Addr: ap("10.96.0.10:80"), Via: proxy.ViaClusterIP,
		},
		Backend: backend,
		Decision: trace.Decision{
			Known: true, Mode: proxy.IPTables, Algorithm: "random", Candidates: 3, Probability: 1.0 / 3, Policy: "Cluster",
			Excluded: proxy.Excluded{NotReady: 1}, Affinity: trace.AffinityNone, Masquerade: "no", SourceSeen: ap("10.244.1.5:40312"),
		},
		Attempts: []trace.Attempt{{Endpoint: backend, Start: noon, Outcome: "established", Latency: 812345 * time.Nanosecond}},
		Outcome:  trace.Closed, Ended: true, Established: 812345 * time.Nanosecond, Duration: 32_100 * time.Microsecond,
		Counted: true, Out: conntrack.Counters{Packets: 12, Bytes: 4100}, In: conntrack.Counters{Packets: 9, Bytes: 18000},
	}
	f.Evidence = f.Evidence.With(trace.NFLog).With(trace.Conntrack)
	return f
}

// with changes a base flow.
func with(id int, change func(f *trace.Flow)) *trace.Flow {
	f := base(id)
	change(f)
	return f
}

// failed makes a flow one without an answer.
func failed(f *trace.Flow, o trace.Outcome, why trace.Reason, retransmits int) {
	f.Outcome, f.Reason = o, why
	f.Ended = o != trace.Unanswered
	f.Established, f.Duration, f.Counted = -1, -1, false
	f.Attempts[0].Outcome, f.Attempts[0].Latency, f.Attempts[0].Retransmits = string(o), -1, retransmits
}

func refusedByRule(f *trace.Flow, o trace.Outcome, why trace.Reason, x proxy.Excluded) {
	failed(f, o, why, 0)
	f.Attempts, f.Backend = nil, trace.Peer{}
	f.Decision = trace.Decision{Known: true, Mode: proxy.IPTables, Policy: "Cluster", Excluded: x, Affinity: trace.AffinityNone, Masquerade: "no"}
}

func udp(f *trace.Flow) {
	f.Tuple = conntrack.NewTuple(conntrack.UDP, f.Tuple.Src(), netip.MustParseAddrPort("10.96.0.10:53"))
	f.Service.Name = proxy.PortName{Namespace: "shop", Name: "dns", Port: "dns", Proto: conntrack.UDP}
	f.Service.Addr = f.Tuple.Dst()
}

// every has each outcome, and each kind of decision.
func every() []*trace.Flow {
	var id int
	var list []*trace.Flow
	add := func(change func(f *trace.Flow)) {
		id++
		list = append(list, with(id, change))
	}
	add(func(f *trace.Flow) {})
	add(func(f *trace.Flow) {
		failed(f, trace.Refused, trace.EndpointRefused, 0)
		f.Decision.Affinity, f.Decision.Probability = trace.AffinityHit, 0
		f.Decision.AffinityTimeout, f.Decision.AffinityAge = 3*time.Hour, 45*time.Second
	})
	add(func(f *trace.Flow) {
		f.Client = trace.Peer{Addr: netip.MustParseAddrPort("10.9.8.7:51022")}
		f.Decision.Mode, f.Decision.Algorithm, f.Decision.Probability = proxy.Userspace, "round-robin", 0
		second := f.Attempts[0]
		f.Attempts[0].Outcome = "refused"
		second.Endpoint = trace.Peer{Addr: netip.MustParseAddrPort("10.244.1.8:8080"), Namespace: "shop", Pod: "foo-9d", Node: "node1"}
		f.Attempts, f.Backend = append(f.Attempts, second), second.Endpoint
		f.Established, f.Outcome, f.Ended, f.Counted = 251*time.Millisecond, trace.Open, false, false
	})
	add(func(f *trace.Flow) { failed(f, trace.Unanswered, trace.SynUnanswered, 2) })
	add(func(f *trace.Flow) { failed(f, trace.Timeout, trace.SynUnanswered, 2) })
	add(func(f *trace.Flow) {
		failed(f, trace.Refused, trace.Unreachable, 0)
		f.Attempts[0].ICMP = "host unreachable from 10.0.0.1"
	})
	add(func(f *trace.Flow) {
		refusedByRule(f, trace.Rejected, trace.NoEndpoints, proxy.Excluded{NotReady: 2})
	})
	add(func(f *trace.Flow) {
		refusedByRule(f, trace.Dropped, trace.NoLocalEndpoints, proxy.Excluded{NotLocal: 2})
		f.Service.Via = proxy.ViaNodePort
	})
	add(func(f *trace.Flow) {
		f.Outcome, f.Reason, f.Duration = trace.Reset, trace.ResetByEndpoint, 12*time.Millisecond
		f.Decision.Masquerade = "hairpin"
	})
	add(func(f *trace.Flow) {
		f.Outcome, f.Reason, f.Counted = trace.Reset, trace.ResetByClient, false
		f.Decision.Affinity, f.Decision.AffinityTimeout = trace.AffinityNew, 3*time.Hour
	})
	add(func(f *trace.Flow) {
		f.Decision.Affinity, f.Decision.AffinityTimeout = trace.AffinityExpired, 3*time.Hour
		f.Decision.AffinityAge, f.Decision.Excluded = 3*time.Hour, proxy.Excluded{}
	})
	add(func(f *trace.Flow) {
		f.Decision.Candidates, f.Decision.Probability, f.Decision.Algorithm = 1, 0, "single"
		f.Decision.Excluded = proxy.Excluded{NotReady: 1, Terminating: 2}
		f.Decision.Policy = "Local"
	})
	add(func(f *trace.Flow) {
		f.Decision = trace.Decision{Note: "before start"}
		f.Existing, f.Outcome, f.Ended, f.Established, f.Counted = true, trace.Open, false, -1, false
		f.Start = noon.Add(-26 * time.Hour)
	})
	add(func(f *trace.Flow) {
		failed(f, trace.Unknown, trace.NoReason, 0)
		f.Missing, f.Incomplete = "fin not seen", true
		f.Client = trace.Peer{Addr: netip.MustParseAddrPort("192.168.0.11:33000"), Node: "node1"}
	})
	add(func(f *trace.Flow) { failed(f, trace.Pending, trace.NoReason, 0); f.Ended = false })
	add(func(f *trace.Flow) { udp(f); f.Duration = 30 * time.Second })
	add(func(f *trace.Flow) { udp(f); failed(f, trace.Timeout, trace.NoReply, 0) })
	add(func(f *trace.Flow) { f.Attempts[0].Retransmits, f.Established = 1, 1013*time.Millisecond })
	return list
}

func headerOf(node string) *trace.Header {
	return &trace.Header{
		Node: node, Mode: proxy.IPTables, Since: noon.Add(-18 * time.Minute),
		Services: []trace.ServiceInfo{{
			Name: proxy.PortName{Namespace: "shop", Name: "foo", Port: "http", Proto: conntrack.TCP},
			Type: "ClusterIP", ClusterIP: netip.MustParseAddr("10.96.0.10"), Port: 80, Ready: 3, Total: 4,
		}},
	}
}

package otlp

import (
	"net/netip"
	"time"

	"github.com/kptrace/kptrace/conntrack"
	"github.com/kptrace/kptrace/proxy"
	"github.com/kptrace/kptrace/trace"
)

var (
	start = time.Date(2026, 11, 25, 12, 0, 0, 123456789, time.UTC)
	ap    = netip.MustParseAddrPort
)

const ms = time.Millisecond

// good is a connection that went well.
func good() *trace.Flow {
	client, vip, ep := ap("10.244.1.5:40312"), ap("10.96.0.10:80"), ap("10.244.2.7:8080")
	f := &trace.Flow{
		ID: 7, Revision: 3, Node: "node1", Start: start, Ended: true, Completed: true,
		Tuple:  conntrack.NewTuple(conntrack.TCP, client, vip),
		Reply:  conntrack.NewTuple(conntrack.TCP, ep, ap("10.244.1.1:61000")),
		Client: trace.Peer{Addr: client, Namespace: "shop", Pod: "web-7f9", Node: "node1", Workload: "Deployment/web"},
		Service: trace.ServiceRef{
			Name: proxy.PortName{Namespace: "shop", Name: "foo", Port: "http", Proto: conntrack.TCP},
			Addr: vip, Via: proxy.ViaClusterIP,
		},
		Backend: trace.Peer{Addr: ep, Namespace: "shop", Pod: "foo-5c", Node: "node2", Workload: "StatefulSet/foo"},
		Decision: trace.Decision{
			Known: true, Mode: proxy.IPTables, Algorithm: "random", Candidates: 3, Probability: 1. / 3,
			Policy: "Cluster", Excluded: proxy.Excluded{NotReady: 1}, Affinity: trace.AffinityHit,
			AffinityAge: 5 * time.Second, AffinityTimeout: 3 * time.Hour, Masquerade: "no",
			SourceSeen: ap("10.244.1.1:61000"),
		},
		Outcome: trace.Closed, Established: 800 * time.Microsecond, Duration: 32 * ms,
		Out: conntrack.Counters{Packets: 12, Bytes: 4100}, In: conntrack.Counters{Packets: 9, Bytes: 18000}, Counted: true,
		Evidence: trace.Evidence(0).With(trace.NFLog).With(trace.Conntrack),
	}
	f.Attempts = []trace.Attempt{{Endpoint: f.Backend, Start: start, Outcome: "established", Latency: f.Established}}
	return f
}

// retried went to a second endpoint after the first did not answer.
func retried() *trace.Flow {
	f := good()
	f.ID = 8
	first := trace.Peer{Addr: ap("10.244.3.9:8080"), Namespace: "shop", Pod: "foo-9d", Node: "node3"}
	f.Attempts = []trace.Attempt{
		{Endpoint: first, Start: start, Outcome: "unanswered", Latency: -1, Retransmits: 2, Resent: 3 * time.Second},
		{Endpoint: f.Backend, Start: start.Add(7 * time.Second), Outcome: "established", Latency: ms},
	}
	f.Established, f.Duration = 7*time.Second+ms, 8*time.Second
	return f
}

// refused was answered by an RST.
func refused() *trace.Flow {
	f := good()
	f.ID, f.Outcome, f.Reason, f.Established, f.Duration = 9, trace.Refused, trace.EndpointRefused, -1, ms
	f.Attempts[0].Outcome, f.Attempts[0].Latency, f.Attempts[0].ICMP = "refused", ms, "port unreachable from 10.244.2.7"
	f.Counted, f.Decision.Affinity = false, trace.AffinityNone
	return f
}

// rejected met a rule of the proxy.
func rejected() *trace.Flow {
	f := good()
	f.ID, f.Outcome, f.Reason, f.Established, f.Duration = 10, trace.Rejected, trace.NoEndpoints, -1, -1
	f.Attempts, f.Backend, f.Counted = nil, trace.Peer{}, false
	f.Decision = trace.Decision{Known: true, Mode: proxy.IPTables, Policy: "Cluster", Excluded: proxy.Excluded{
		NotReady: 1, Terminating: 2, OtherZone: 3, NotLocal: 4, Overlay: 5,
	}}
	return f
}

// gaveUp was never answered.
func gaveUp() *trace.Flow {
	f := good()
	f.ID, f.Outcome, f.Reason, f.Established, f.Duration = 11, trace.Timeout, trace.SynUnanswered, -1, -1
	f.Attempts[0].Outcome, f.Attempts[0].Latency, f.Attempts[0].Reason = "timeout", -1, f.Reason
	f.Attempts[0].Retransmits, f.Attempts[0].Resent = 3, 7*time.Second
	return f
}

// blind is older than kptrace, and its end was lost.
func blind() *trace.Flow {
	f := good()
	f.ID, f.Outcome, f.Missing, f.Existing, f.Incomplete = 12, trace.Unknown, "fin not seen", true, true
	f.Established, f.Duration, f.Counted = -1, -1, false
	f.Decision = trace.Decision{Note: "older than kptrace"}
	f.Attempts = nil
	return f
}

// carrying has requests that name spans: 3 linked, 2 more.
func carrying(flags byte) *trace.Flow {
	f := good()
	f.ID = 13
	for i := range 3 {
		c := trace.Carried{Time: start.Add(time.Duration(i) * ms)}
		c.Trace[0], c.Span[0], c.Flags = byte(i+1), byte(i+1), flags
		f.Carried = append(f.Carried, c)
	}
	f.CarriedMore = 2
	return f
}

func all() []*trace.Flow {
	return []*trace.Flow{good(), retried(), refused(), rejected(), gaveUp(), blind(), carrying(1)}
}

// noted is a decision of which something is to be said.
func noted() *trace.Flow {
	f := good()
	f.ID, f.Decision.Note = 14, "the rules had changed meanwhile"
	return f
}

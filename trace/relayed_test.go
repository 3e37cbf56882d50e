package trace

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kptrace/kptrace/conntrack"
)

// relayedFlow was sent to one endpoint that refused and another that answered.
func relayedFlow() *Flow {
	at := func(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
	start := time.Unix(100, 0)
	client, one, two := at("10.9.0.2:40000"), at("10.1.0.2:8080"), at("10.1.0.3:8080")
	return &Flow{
		Tuple:  conntrack.NewTuple(conntrack.TCP, client, at("10.96.0.10:80")),
		Reply:  conntrack.NewTuple(conntrack.TCP, at("10.0.0.1:30000"), client),
		Client: Peer{Addr: client}, Backend: Peer{Addr: two},
		Decision: Decision{Candidates: 3, Affinity: AffinityReset, SourceSeen: at("10.0.0.1:51000")},
		Attempts: []Attempt{
			{Endpoint: Peer{Addr: one, Pod: "foo-1"}, Start: start, Outcome: "refused", Latency: 2 * time.Millisecond},
			{Endpoint: Peer{Addr: two}, Start: start.Add(3 * time.Millisecond), Outcome: "established", Latency: time.Millisecond},
		},
	}
}

func purposes(p *Path) (out []string) {
	for i := range p.Hops {
		s := string(p.Hops[i].Kind) + ": " + p.Hops[i].Purpose
		for _, c := range p.Hops[i].Changes {
			s += " {" + c.Field + " " + c.Before + " " + c.After + "}"
		}
		out = append(out, s)
	}
	return out
}

func TestRelay(t *testing.T) {
	t.Parallel()
	f := relayedFlow()
	want := []string{
		"rule: client's",
		"userspace: accepted at 10.0.0.1:30000",
		"userspace: pick one of 3: foo-1 10.1.0.2:8080",
		"userspace: dial 10.1.0.2:8080: refused after 2ms",
		"userspace: affinity: the entry for 10.9.0.2 was given up, its endpoint did not answer",
		"userspace: pick another: 10.1.0.3:8080",
		"userspace: dial 10.1.0.3:8080: established after 1ms {src 10.9.0.2:40000 10.0.0.1:51000} {dst 10.0.0.1:30000 10.1.0.3:8080}",
		"rule: proxy's",
	}
	own := conntrack.NewTuple(conntrack.TCP, f.Decision.SourceSeen, f.Backend.Addr)
	leg := &Path{Tuple: own, Left: own, Incomplete: true, Note: "lost", Hops: []Hop{{Kind: HopRule, Purpose: "proxy's"}}}
	p := &Path{Tuple: f.Tuple, Hops: []Hop{{Kind: HopRule, Purpose: "client's"}}}

	early := *f
	early.Attempts = early.Attempts[:1]
	p.Leg(leg) // nothing before the proxy's part
	p.Relay(&early)
	if n := len(p.Hops); n != 5 {
		t.Errorf("after the first try: %q", purposes(p))
	}
	p.Relay(f)
	p.Leg(leg)
	p.Leg(leg) // sent again
	p.Relay(f)
	if got := purposes(p); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if p.Left != own || !p.Incomplete || p.Note != "lost" || p.Endpoint() != f.Backend.Addr {
		t.Errorf("left as %v, incomplete %v %q, to %v", p.Left, p.Incomplete, p.Note, p.Endpoint())
	}
	if at := p.Hops[6].Time; !at.Equal(time.Unix(100, 4e6)) || p.Hops[6].Source != Userspace {
		t.Errorf("established at %v by %v", at, p.Hops[6].Source)
	}
}

// TestRelayWords has every word of affinity, and the end without an endpoint.
func TestRelayWords(t *testing.T) {
	t.Parallel()
	for affinity, want := range map[Affinity]string{
		AffinityHit:     "affinity: 10.9.0.2 was sent there 1.5s before",
		AffinityNew:     "affinity: no entry for 10.9.0.2",
		AffinityExpired: "affinity: the entry for 10.9.0.2 had expired, 1.5s old",
		AffinityNone:    "",
	} {
		f := relayedFlow()
		f.Attempts, f.Decision.Affinity, f.Decision.AffinityAge = f.Attempts[1:], affinity, 1500*time.Millisecond
		var p Path
		p.Relay(f)
		got := strings.Join(purposes(&p), "\n")
		if want != "" && !strings.Contains(got, want) || want == "" && strings.Contains(got, "affinity") ||
			(affinity == AffinityHit) == strings.Contains(got, "one of 3") {
			t.Errorf("%s: %s", affinity, got)
		}
	}
	f := relayedFlow()
	f.Attempts, f.Outcome = nil, Rejected
	var p Path
	p.Relay(f)
	if n := len(p.Hops); n != 2 || p.Hops[1].Verdict != "reject" {
		t.Errorf("without endpoints: %q", purposes(&p))
	}
}
